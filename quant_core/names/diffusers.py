"""Models under diffusers' names: ComfyUI renames and joins their weights and biases, and nothing else.

So scales and descriptions are left behind: FP8 and INT8 draw noise without a word, packed weights do not load (seen
with 0.29, tests/comfy/test_tools_sampling.py). In 16 bits such files load well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

# {model: tensors that all have to be there}, by which ComfyUI tells them itself (comfy/model_detection.py).
_SIGNS: Mapping[str, tuple[str, ...]] = {
    "AuraFlow": ("joint_transformer_blocks.0.attn.add_k_proj.weight",),
    "PixArt": ("adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias"),
    "Z-Image": ("noise_refiner.0.attention.norm_k.weight", "noise_refiner.0.attention.to_k.weight"),
    "Flux": ("x_embedder.weight", "single_transformer_blocks.0.attn.to_q.weight"),
    "SD3": ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"),
    "SD or SDXL": ("conv_in.weight", "time_embedding.linear_1.weight"),
}


def diffusers_warning(names: Collection[str]) -> str | None:
    """Why ComfyUI will not run these tensors quantized, and what to do; None when they have other names."""
    for model, signs in _SIGNS.items():
        if all(sign in names for sign in signs):
            return (
                f"The layers have diffusers' names ({model}). ComfyUI renames only weights and biases of such files "
                "and loses what quantizing adds: it would draw noise or not load. Quantize the model under ComfyUI's "
                "names: take another download, or load the 16-bit file there and use Model from Graph. diffusers' own "
                "loader is not concerned."
            )
    return None
