"""The tables of diffusers_layers.py: {name in ComfyUI: its names elsewhere}; # is a block's number.

Source: the module names of the published checkpoints in both layouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .layer_cuts import Alias, Cut

_THREE = (Cut.Q, Cut.K, Cut.V)


def _parts(block: str, names: Iterable[str], cuts: Iterable[Cut] = _THREE) -> tuple[Alias, ...]:
    return tuple(Alias(f"{block}.{name}", cut) for name, cut in zip(names, cuts, strict=True))


def _same(block: str, theirs: str, layers: Mapping[str, str]) -> dict[str, tuple[Alias, ...]]:
    """Whole layers of a block. layers: {name in the block: names elsewhere, with a blank between}."""
    return {
        f"{block}.{own}": tuple(Alias(f"{theirs}.{name}") for name in names.split()) for own, names in layers.items()
    }


_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
_JOINT, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"

_FLUX = {
    "double_blocks.#.img_attn.qkv": (*_parts(f"{_JOINT}.attn", _QKV), Alias("double_blocks.#.qkv1")),
    "double_blocks.#.txt_attn.qkv": (*_parts(f"{_JOINT}.attn", _ADDED_QKV), Alias("double_blocks.#.qkv2")),
    "single_blocks.#.linear1": (
        *_parts(f"{_SINGLE}.attn", _QKV),
        Alias(f"{_SINGLE}.proj_mlp", Cut.REST),
        Alias(f"{_SINGLE}.attn.to_qkv_mlp_proj"),  # Flux 2
        Alias("single_blocks.#.linear1_qkv", Cut.QKV),
        Alias("single_blocks.#.qkv", Cut.QKV),
    ),
    **_same(
        "double_blocks.#",
        _JOINT,
        {
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.net.0.proj ff.linear_in",
            "img_mlp.2": "ff.net.2 ff.linear_out",
            "txt_mlp.0": "ff_context.net.0.proj ff_context.linear_in",
            "txt_mlp.2": "ff_context.net.2 ff_context.linear_out",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.norm.key_norm": "attn.norm_k",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
        },
    ),
    **_same(
        "single_blocks.#",
        _SINGLE,
        {
            "linear2": "proj_out attn.to_out",
            "modulation.lin": "norm.linear",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        },
    ),
}
_FLUX["single_blocks.#.linear2"] += (Alias("single_blocks.#.proj"),)  # this and qkv, proj1 and the like: USO's LoRAs
_FLUX["double_blocks.#.img_attn.proj"] += (Alias("double_blocks.#.proj1"),)
_FLUX["double_blocks.#.txt_attn.proj"] += (Alias("double_blocks.#.proj2"),)
_EMBEDDERS = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
_FLUX_REST = {
    "final_layer.linear": "proj_out",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "pos_embed_input": "controlnet_x_embedder",
    **_EMBEDDERS,
}

_SD3 = {
    "joint_blocks.#.x_block.attn.qkv": _parts(f"{_JOINT}.attn", _QKV),
    "joint_blocks.#.x_block.attn2.qkv": _parts(f"{_JOINT}.attn2", _QKV),
    "joint_blocks.#.context_block.attn.qkv": _parts(f"{_JOINT}.attn", _ADDED_QKV),
    **_same(
        "joint_blocks.#.x_block",
        _JOINT,
        {
            "attn.proj": "attn.to_out.0",
            "attn.ln_q": "attn.norm_q",
            "attn.ln_k": "attn.norm_k",
            "attn2.proj": "attn2.to_out.0",
            "attn2.ln_q": "attn2.norm_q",
            "attn2.ln_k": "attn2.norm_k",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm1.linear",
        },
    ),
    **_same(
        "joint_blocks.#.context_block",
        _JOINT,
        {
            "attn.proj": "attn.to_add_out",
            "attn.ln_q": "attn.norm_added_q",
            "attn.ln_k": "attn.norm_added_k",
            "mlp.fc1": "ff_context.net.0.proj",
            "mlp.fc2": "ff_context.net.2",
        },
    ),
    "joint_blocks.#.context_block.adaLN_modulation.1": (Alias(f"{_JOINT}.norm1_context.linear", Cut.SWAPPED),),
}
_SD3_REST = {
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out",
}

_AURAFLOW = _same(
    "double_layers.#",
    "joint_transformer_blocks.#",
    {
        "attn.w2q": "attn.to_q",
        "attn.w2k": "attn.to_k",
        "attn.w2v": "attn.to_v",
        "attn.w2o": "attn.to_out.0",
        "attn.w1q": "attn.add_q_proj",
        "attn.w1k": "attn.add_k_proj",
        "attn.w1v": "attn.add_v_proj",
        "attn.w1o": "attn.to_add_out",
        "mlpX.c_fc1": "ff.linear_1",
        "mlpX.c_fc2": "ff.linear_2",
        "mlpX.c_proj": "ff.out_projection",
        "mlpC.c_fc1": "ff_context.linear_1",
        "mlpC.c_fc2": "ff_context.linear_2",
        "mlpC.c_proj": "ff_context.out_projection",
        "modX.1": "norm1.linear",
        "modC.1": "norm1_context.linear",
    },
) | _same(
    "single_layers.#",
    _SINGLE,
    {
        "attn.w1q": "attn.to_q",
        "attn.w1k": "attn.to_k",
        "attn.w1v": "attn.to_v",
        "attn.w1o": "attn.to_out.0",
        "modCX.1": "norm1.linear",
        "mlp.c_fc1": "ff.linear_1",
        "mlp.c_fc2": "ff.linear_2",
        "mlp.c_proj": "ff.out_projection",
    },
)
_AURAFLOW_REST = {
    "t_embedder.mlp.0": "time_step_proj.linear_1",
    "t_embedder.mlp.2": "time_step_proj.linear_2",
    "cond_seq_linear": "context_embedder",
    "init_x_linear": "pos_embed.proj",
    "final_linear": "proj_out",
}

_PIXART = {
    "blocks.#.attn.qkv": _parts(f"{_JOINT}.attn1", _QKV),
    "blocks.#.cross_attn.kv_linear": _parts(f"{_JOINT}.attn2", ("to_k", "to_v"), (Cut.FIRST, Cut.SECOND)),
    **_same(
        "blocks.#",
        _JOINT,
        {
            "attn.proj": "attn1.to_out.0",
            "cross_attn.q_linear": "attn2.to_q",
            "cross_attn.proj": "attn2.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "scale_shift_table": "scale_shift_table",
        },
    ),
}
_PIXART_REST = {
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_embedding": "caption_projection.y_embedding",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}

_LUMINA: dict[str, tuple[Alias, ...]] = {}
for _block in ("layers.#", "context_refiner.#", "noise_refiner.#"):
    _LUMINA[f"{_block}.attention.qkv"] = _parts(f"{_block}.attention", _QKV)
    _LUMINA |= _same(
        f"{_block}.attention", f"{_block}.attention", {"q_norm": "norm_q", "k_norm": "norm_k", "out": "to_out.0"}
    )
_LUMINA_REST = {
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    "x_embedder": "all_x_embedder.2-1",
}

_KREA2: dict[str, tuple[Alias, ...]] = {}
for _block, _theirs in (
    ("blocks.#", _JOINT),
    ("txtfusion.layerwise_blocks.#", "text_fusion.layerwise_blocks.#"),
    ("txtfusion.refiner_blocks.#", "text_fusion.refiner_blocks.#"),
):
    _KREA2 |= _same(
        _block,
        _theirs,
        {
            "attn.wq": "attn.to_q",
            "attn.wk": "attn.to_k",
            "attn.wv": "attn.to_v",
            "attn.wo": "attn.to_out.0",
            "attn.gate": "attn.to_gate",
            "mlp.gate": "ff.gate",
            "mlp.up": "ff.up",
            "mlp.down": "ff.down",
        },
    )
_KREA2_REST = {
    "first": "img_in",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
    "last.linear": "final_layer.linear",
}

# Families of models that share names: (what tells one, its blocks, what it has beside them).
_SWAPPED = "final_layer.adaLN_modulation.1"  # of Flux and SD3


def _rest(whole: Mapping[str, str], swapped: str = "") -> dict[str, tuple[Alias, ...]]:
    """Layers outside the blocks. swapped: the last modulation, of which diffusers has scale and shift exchanged."""
    table: dict[str, tuple[Alias, ...]] = {own: (Alias(name),) for own, name in whole.items()}
    if swapped:
        table[swapped] = (Alias("norm_out.linear", Cut.SWAPPED),)
    return table


BLOCKS: Mapping[str, tuple[Alias, ...]] = {**_FLUX, **_SD3, **_AURAFLOW, **_PIXART, **_LUMINA, **_KREA2}
# {block's layer that tells the family: names of layers outside its blocks}
BESIDE: Mapping[str, Mapping[str, tuple[Alias, ...]]] = {
    "double_blocks.#.img_attn.qkv": _rest(_FLUX_REST, _SWAPPED),
    "joint_blocks.#.x_block.attn.qkv": _rest(_SD3_REST, _SWAPPED),
    "double_layers.#.attn.w2q": _rest(_AURAFLOW_REST, "modF.1"),
    "blocks.#.cross_attn.kv_linear": _rest(_PIXART_REST),
    "layers.#.attention.qkv": _rest(_LUMINA_REST),
    "blocks.#.attn.wq": _rest(_KREA2_REST),
}
