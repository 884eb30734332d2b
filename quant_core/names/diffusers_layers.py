"""What diffusers and the tools around it call the layers that ComfyUI's models have under other names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from .diffusers_tables import BESIDE, BLOCKS
from .layer_cuts import Alias
from .unet_layers import unet_names

_NUMBER = re.compile(r"\.(\d+)\.")
# Hunyuan Video's published names, which its file in ComfyUI keeps, and those of ComfyUI's module. Every pair goes both
# ways; the tools that train it write either.
_HUNYUAN = (
    ("_mod.linear", "_mod.lin"),
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("_attn_q_norm", "_attn.norm.query_norm"),
    ("_attn_k_norm", "_attn.norm.key_norm"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    (".modulation.linear", ".modulation.lin"),
    (".q_norm", ".norm.query_norm"),
    (".k_norm", ".norm.key_norm"),
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
    ("t_embedder.mlp.0", "t_embedder.in_layer"),
    ("t_embedder.mlp.2", "t_embedder.out_layer"),
    ("c_embedder.linear_1", "c_embedder.in_layer"),
    ("c_embedder.linear_2", "c_embedder.out_layer"),
)
_HUNYUAN_PARTS = ("double_blocks.", "single_blocks.", "txt_in.", "time_in.", "vector_in.", "guidance_in.")


def aliases(own: Collection[str]) -> Iterator[tuple[str, Alias]]:
    """(layer, another name of it) for the layers of one model. own: their names in it, without a prefix."""
    present = {_template(name)[0] for name in own}
    beside = [table for sign, table in BESIDE.items() if sign in present]
    unet = unet_names(own)
    for name in own:
        for known in (name, *_hunyuan(name)):
            if known != name:
                yield name, Alias(known)
            for alias in _listed(known):
                yield name, alias
            for table in beside:
                for alias in table.get(known, ()):
                    yield name, alias
        if name in unet:
            yield name, Alias(unet[name])
            if unet[name].startswith("add_embedding."):  # what it is called where it is the only condition
                yield name, Alias(unet[name].replace("add_", "class_", 1))
        if name.startswith("decoder."):  # ACE-Step 1.5: LoRAs name the layers of its decoder alone
            yield name, Alias(name.removeprefix("decoder."))


def _template(name: str) -> tuple[str, str]:
    """("double_blocks.#.img_mlp.0", "7") of double_blocks.7.img_mlp.0; the number "" where there is none."""
    match = _NUMBER.search(name)
    return (f"{name[: match.start()]}.#.{name[match.end() :]}", match[1]) if match else (name, "")


def _listed(name: str) -> Iterator[Alias]:
    template, number = _template(name)
    for alias in BLOCKS.get(template, ()):
        yield Alias(alias.name.replace("#", number), alias.cut)


def _hunyuan(name: str) -> list[str]:
    if not name.startswith(_HUNYUAN_PARTS):
        return []
    module, file = name, name
    for published, inner in _HUNYUAN:
        if name.endswith(published):
            module = name.removesuffix(published) + inner
        if name.endswith(inner):
            file = name.removesuffix(inner) + published
    return [known for known in (module, file) if known != name]
