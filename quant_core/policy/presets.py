"""Names that the older converter's model filters keep in high precision, as a table; used for its command line.

Our own general rules (general.py) cover most of them without a filter. Entries are plain parts of layer names.
Source: the option list and the filter registry of convert_to_quant 1.3.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import RequestError


@dataclass(frozen=True, slots=True)
class Preset:
    """keep: parts of names that stay in high precision. category: text, diffusion, video or image.

    text_encoder: the older tool also wrote the weight's scale as input_scale.
    """

    category: str
    keep: tuple[str, ...]
    text_encoder: bool = False


# Kept on every NVFP4 and MXFP8 conversion, and by three of the filters.
AVOID = (
    "norm",
    "bias",
    "embed_tokens",
    "lm_head",
    "shared",
    "patch_embedding",
    "audio_model.patch_embedding",
    "ref_conv",
    "control_adapter",
    "motion_encoder.enc.net_app",
    "face_encoder.conv",
    "pose_patch_embedding",
    "motion_encoder.enc.fc",
    "img_emb.proj",
    "k_norm",
    "q_norm",
    "motion_encoder.dec",
    "head.modulation",
    "casual_audio_encoder",
    "cond_encoder",
    "frame_packer",
    "norm_k",
    "norm_q",
    "tekken_model",
    "multi_modal_projector",
    "patch_conv",
    "ln_pre",
    "input_layernorm",
    "attention_norm",
    "post_attention_layernorm",
    "mm_input_projection_weight",
)

PRESETS = {
    "gemma4": Preset(
        "text", ("audio", "per_layer_input_gate", "per_layer_projection", "vision", "multi_modal_projector")
    ),
    "qwen35": Preset(
        "text",
        (
            ".layers.0.",
            ".layers.63.",
            "lm_head",
            "embed_tokens",
            "in_proj_a",
            "in_proj_b",
            "visual.pos_embed",
            "visual.patch_embed",
            "merger",
            "mtp.fc",
            "visual.blocks.0.",
        ),
        text_encoder=True,
    ),
    "t5xxl": Preset("text", AVOID + ("decoder", "lm_head"), text_encoder=True),
    "mistral": Preset("text", AVOID, text_encoder=True),
    "visual": Preset("text", ("mlp.down_proj", "mlp.up_proj", "mlp.gate_proj"), text_encoder=True),
    "generic_text": Preset("text", (), text_encoder=True),
    "anima": Preset(
        "diffusion",
        ("net.blocks.0.", "net.blocks.1.adaln_modulation", "final_layer", "llm_adapter", "t_embedder", "x_embedder"),
    ),
    "lens": Preset(
        "diffusion", ("time_text_embed", "img_in", "norm_out", "proj_out", "img_mod.1", "txt_mod.1", "txt_in")
    ),
    "flux2": Preset("diffusion", ("stream_modulation", "guidance_in", "time_in", "final_layer", "img_in", "txt_in")),
    "distillation_large": Preset("diffusion", ("distilled_guidance_layer", "final_layer", "img_in", "txt_in")),
    "distillation_small": Preset("diffusion", ("distilled_guidance_layer",)),
    "nerf_large": Preset(
        "diffusion", ("distilled_guidance_layer", "nerf_blocks", "nerf_image_embedder", "txt_in", "_attn.proj")
    ),
    "nerf_small": Preset("diffusion", ("distilled_guidance_layer", "nerf_blocks", "nerf_image_embedder")),
    "radiance": Preset("diffusion", ("img_in_patch", "nerf_final_layer_conv", "__x0__")),
    "krea2": Preset("diffusion", ("firs", "las", "tml", "txtfusion", "last.modulatio", "tpro")),
    "ideogram4": Preset(
        "diffusion",
        ("embed_image_indicator", "t_embedding", "llm_cond_proj", "adaln_proj", "final_layer", "input_proj"),
    ),
    "wan": Preset(
        "video",
        AVOID
        + (
            "text_embedding",
            "time_embedding",
            "audio_model.text_embedding",
            "casual_audio_encoder",
            "frame_packer",
            "trainable_cond_mask",
            "cond_encoder",
            "audio_model.time_embedding",
            "time_projection",
            "video_model.time_projection",
            "head.head",
            "face_encoder.out_proj",
            "face_adapter",
            "audio_injector",
        ),
    ),
    "hunyuan": Preset(
        "video",
        (
            "layernorm",
            "img_attn_k_norm",
            "img_attn_q_norm",
            "txt_attn_k_norm",
            "txt_attn_q_norm",
            "norm1",
            "norm2",
            "vision_in.proj.0",
            "vision_in.proj.4",
            "img_in.proj",
            "cond_type_embedding",
        ),
    ),
    "qwen": Preset(
        "image",
        (
            "norm_added_k",
            "norm_added_q",
            "norm_k",
            "norm_q",
            "txt_norm",
            "time_text_embed",
            "img_in",
            "norm_out",
            "proj_out",
            "transformer_blocks.0.img_mod.1",
            "txt_in",
        ),
    ),
    "zimage": Preset(
        "image",
        (
            "cap_embedder.0",
            "cap_pad_token",
            "attention_norm1",
            "attention_norm2",
            "ffn_norm1",
            "ffn_norm2",
            "k_norm",
            "q_norm",
            "x_pad_token",
            "x_embedder",
            "clip_text_pooled_proj",
            "final_layer",
            "cap_embedder.1",
            "adaLN_modulation",
            "t_embedder",
            "time_text_embed",
        ),
    ),
    "zimage_refiner": Preset(
        "image",
        (
            "cap_embedder.0",
            "cap_pad_token",
            "attention_norm1",
            "attention_norm2",
            "ffn_norm1",
            "ffn_norm2",
            "k_norm",
            "q_norm",
            "x_pad_token",
            "context_refiner",
            "noise_refiner",
        ),
    ),
    "boogu": Preset(
        "image",
        (
            "image_index_embedding",
            "ref_image_patch_embedder",
            "time_caption_embed",
            "x_embedder",
            "norm_out.linear_1",
            "norm_out.linear_2",
        ),
    ),
    "ltxv2": Preset(
        "video",
        (
            "scale_shift_table",
            "text_embedding_projection",
            "audio_vae",
            "audio_embeddings_connector",
            "adaln_single",
            "audio_adaln_single",
            "audio_patchify_proj",
            "audio_proj_out",
            "audio_prompt_adaln_single",
            "av_ca_a2v_gate_adaln_single",
            "av_ca_audio_scale_shift_adaln_single",
            "av_ca_v2a_gate_adaln_single",
            "av_ca_video_scale_shift_adaln_single",
            "patchify_proj",
            "proj_out",
            "prompt_adaln_single",
            "transformer_blocks.0.",
            "transformer_blocks.1.",
            "transformer_blocks.46.",
            "transformer_blocks.47.",
            "video_embeddings_connector",
            "vae.decoder",
            "vae.encoder",
            "vocoder",
            "to_gate_logits",
        ),
    ),
}


def keep_patterns(names: Iterable[str], layers: Iterable[str]) -> tuple[str, ...]:
    """Regexes for Policy.keep: the entries of these presets that occur in the model's layers, sorted.

    names: of PRESETS. Raises RequestError for another one.
    """
    parts: set[str] = set()
    for name in names:
        if name not in PRESETS:
            raise RequestError(f"there is no model filter {name!r}. Choose one of {', '.join(PRESETS)}.")
        parts.update(PRESETS[name].keep)
    return matching(parts, layers)


def matching(parts: Iterable[str], layers: Iterable[str]) -> tuple[str, ...]:
    """The parts that occur in some layer's name, escaped and sorted: a regex without a match would be an error."""
    everything = list(layers)
    return tuple(re.escape(part) for part in sorted(parts) if any(part in layer for layer in everything))
