"""A checkpoint file -> the demo's model, its quantized Linears running as they do for a user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from torch import Tensor, nn

from ..layouts import register_layouts, tensor_of_layer
from ..quant_core.checkpoint.source import Source, open_source
from ..quant_core.errors import InputFileError, some_of
from ..quant_core.formats.base import Format
from ..quant_core.stored.layers import StoredLayer, stored_layers
from .tiny_mmdit import TinyMMDiT

# What multiplies a layer's input: a QuantizedTensor's own F.linear, or a plain float32 weight decoded once.
LAYOUT, DEQUANTIZED, PLAIN = "layout", "dequantized", "plain"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """layers: the quantized ones, by name. runs_through: LAYOUT, DEQUANTIZED, both with counts, or PLAIN for none."""

    model: TinyMMDiT
    layers: Mapping[str, StoredLayer]
    runs_through: str


def load_model(path: Path) -> LoadedModel:
    """float32 model from a file in any registered format. InputFileError when it is not the demo's model."""
    register_layouts()
    with open_source(path) as source:
        layers = stored_layers(source)
        taken = {name for layer in layers.values() for name in layer.names.values()}
        plain = {name: source.read(name).float() for name in source.tensors if name not in taken}
        weights = {name: _weight(source, layer) for name, layer in layers.items()}
    model = _empty_model(path, plain)
    missing, unexpected = model.load_state_dict(plain, strict=False, assign=True)
    if unexpected or set(missing) != {f"{name}.weight" for name in layers}:
        raise InputFileError(
            f"{path}: these tensors are not the demo's model: {some_of([*unexpected, *missing])}. "
            "Give a file made from assets/tiny_mmdit_256.safetensors."
        )
    for name, weight in weights.items():
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return LoadedModel(model.eval(), layers, _runs_through(weights))


def _empty_model(path: Path, plain: Mapping[str, Tensor]) -> TinyMMDiT:
    """The architecture that the tensors' names and shapes tell, on the meta device."""
    context = plain.get("context_embedder.bias")
    blocks = {name.split(".")[1] for name in plain if name.startswith("joint_blocks.")}
    if context is None or not blocks:
        raise InputFileError(
            f"{path}: no SD3-type MMDiT (context_embedder and joint_blocks are missing). "
            "Give a file made from assets/tiny_mmdit_256.safetensors."
        )
    with torch.device("meta"):
        return TinyMMDiT(len(blocks))


def has_layout(fmt: Format) -> bool:
    """Whether a QuantizedTensor of this format can be made here: comfy-kitchen's layouts and ours, no others.

    The per-tensor fp8 layouts are registered by ComfyUI, so without it those formats are dequantized.
    """
    try:
        get_layout_class(fmt.runtime.layout)
    except KeyError:
        return False
    return True


def _weight(source: Source, layer: StoredLayer) -> Tensor:
    """A QuantizedTensor where the format has a layout, else float32 [N, K]."""
    if not has_layout(layer.format):
        return layer.decode(source)
    tensors = {suffix: source.read(name) for suffix, name in layer.names.items()}
    return tensor_of_layer(layer.format, tensors, layer.shape, torch.float32)


def _runs_through(weights: Mapping[str, Tensor]) -> str:
    """Counts what was really made; a file may mix formats."""
    if not weights:
        return PLAIN
    in_layouts = sum(isinstance(weight, QuantizedTensor) for weight in weights.values())
    if in_layouts in (0, len(weights)):
        return LAYOUT if in_layouts else DEQUANTIZED
    return f"{LAYOUT} {in_layouts}, {DEQUANTIZED} {len(weights) - in_layouts}"
