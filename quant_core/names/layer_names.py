"""One layer, many names: what files, LoRAs and lists call the layers of a model, resolved against the model itself."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import RequestError
from .prefixes import UNDERSCORE_PREFIXES, strip_prefixes

_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def _attention(block: str, names: tuple[str, ...], module: str = "attn") -> tuple[str, ...]:
    return tuple(f"{block}.{module}.{name}" for name in names)


_JOINT = r"transformer_blocks.\1"
_SINGLE = r"single_transformer_blocks.\1"
# ComfyUI's name of a layer -> what diffusers calls it, or its parts: the rows of a LoRA_A see the same inputs.
# Source: the module names of the published checkpoints in both layouts (Flux and SD3).
_DIFFUSERS = tuple(
    (re.compile(pattern + "$"), names)
    for pattern, names in (
        (r"double_blocks\.(\d+)\.img_attn\.qkv", _attention(_JOINT, _QKV)),
        (r"double_blocks\.(\d+)\.txt_attn\.qkv", _attention(_JOINT, _ADDED_QKV)),
        (r"double_blocks\.(\d+)\.img_attn\.proj", _attention(_JOINT, ("to_out.0",))),
        (r"double_blocks\.(\d+)\.txt_attn\.proj", _attention(_JOINT, ("to_add_out",))),
        (r"double_blocks\.(\d+)\.img_mlp\.0", (f"{_JOINT}.ff.net.0.proj",)),
        (r"double_blocks\.(\d+)\.img_mlp\.2", (f"{_JOINT}.ff.net.2",)),
        (r"double_blocks\.(\d+)\.txt_mlp\.0", (f"{_JOINT}.ff_context.net.0.proj",)),
        (r"double_blocks\.(\d+)\.txt_mlp\.2", (f"{_JOINT}.ff_context.net.2",)),
        (r"double_blocks\.(\d+)\.img_mod\.lin", (f"{_JOINT}.norm1.linear",)),
        (r"double_blocks\.(\d+)\.txt_mod\.lin", (f"{_JOINT}.norm1_context.linear",)),
        (r"single_blocks\.(\d+)\.linear1", (*_attention(_SINGLE, _QKV), f"{_SINGLE}.proj_mlp")),
        (r"single_blocks\.(\d+)\.linear2", (f"{_SINGLE}.proj_out",)),
        (r"single_blocks\.(\d+)\.modulation\.lin", (f"{_SINGLE}.norm.linear",)),
        (r"joint_blocks\.(\d+)\.x_block\.attn\.qkv", _attention(_JOINT, _QKV)),
        (r"joint_blocks\.(\d+)\.context_block\.attn\.qkv", _attention(_JOINT, _ADDED_QKV)),
        (r"joint_blocks\.(\d+)\.x_block\.attn\.proj", _attention(_JOINT, ("to_out.0",))),
        (r"joint_blocks\.(\d+)\.context_block\.attn\.proj", _attention(_JOINT, ("to_add_out",))),
        (r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv", _attention(_JOINT, _QKV, "attn2")),
        (r"joint_blocks\.(\d+)\.x_block\.attn2\.proj", _attention(_JOINT, ("to_out.0",), "attn2")),
        (r"joint_blocks\.(\d+)\.x_block\.mlp\.fc1", (f"{_JOINT}.ff.net.0.proj",)),
        (r"joint_blocks\.(\d+)\.x_block\.mlp\.fc2", (f"{_JOINT}.ff.net.2",)),
        (r"joint_blocks\.(\d+)\.context_block\.mlp\.fc1", (f"{_JOINT}.ff_context.net.0.proj",)),
        (r"joint_blocks\.(\d+)\.context_block\.mlp\.fc2", (f"{_JOINT}.ff_context.net.2",)),
        (r"joint_blocks\.(\d+)\.x_block\.adaLN_modulation\.1", (f"{_JOINT}.norm1.linear",)),
        (r"joint_blocks\.(\d+)\.context_block\.adaLN_modulation\.1", (f"{_JOINT}.norm1_context.linear",)),
    )
)


class LayerNames:
    """Finds a model's layer by any of its names. names: the layers as the model's file or module tree has them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._exact = {name: name for name in names}
        self._dotted: dict[str, list[str]] = {}
        self._joined: dict[str, list[str]] = {}
        for name in self._exact:
            own = strip_prefixes(name)
            for alias in (own, *diffusers_names(own)):
                self._dotted.setdefault(alias, []).append(name)
                self._joined.setdefault(alias.replace(".", "_"), []).append(name)

    def resolve(self, name: str) -> str | None:
        """The model's own name of the layer, None when it has no such layer.

        RequestError when the name fits several layers.
        """
        if name in self._exact:
            return name
        found = self._dotted.get(strip_prefixes(name), [])
        if not found:
            prefix = next((prefix for prefix in UNDERSCORE_PREFIXES if name.startswith(prefix)), None)
            found = self._joined.get(name[len(prefix) :], []) if prefix else []
        if len(found) > 1:
            raise RequestError(f"the name {name!r} fits several layers: {', '.join(found)}. Rename it to one of them.")
        return found[0] if found else None


def diffusers_names(own: str) -> tuple[str, ...]:
    """What diffusers calls a layer that has this name (without prefix) in ComfyUI; () where the names agree."""
    for pattern, names in _DIFFUSERS:
        match = pattern.match(own)
        if match:
            return tuple(match.expand(name) for name in names)
    return ()
