"""The changes that LoRAs make to the tensors of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.source import Source
from ..names.layer_names import LayerNames
from ..names.lora_parts import Kind
from ..names.prefixes import MODEL_PREFIX
from ..stored.layers import stored_layers
from .lora_adapters import ADAPTERS, Factors, Shape, decomposed

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a tensor, or of some of its rows.

    part: of a full difference, which tensor it is. swapped: the halves of the change are exchanged. reshape: the
    tensor is padded to this shape first.
    """

    factors: Factors
    kind: Kind
    strength: float
    rows: slice
    swapped: bool = False
    part: str = ""
    reshape: Shape | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """The changed tensor. weight: float32; it may be written to."""
        if self.reshape is not None:
            padded = torch.zeros(self.reshape)
            padded[tuple(slice(size) for size in weight.shape)] = weight
            weight = padded
        rows = weight[self.rows] if weight.dim() else weight  # a view: writes reach `weight`
        if self.part:
            self._add_whole(rows)
            return weight
        adapter = ADAPTERS[self.kind]
        delta = self._in_order(adapter.delta(self.factors, rows, self.strength))
        rank = adapter.rank(self.factors, tuple(rows.shape))
        scale = 1.0 if rank is None else self.factors.scale(rank)
        if "dora_scale" in self.factors.names:
            rows.copy_(decomposed(rows, delta * scale, self.factors.read("dora_scale"), self.strength))
        else:
            rows += delta.reshape(rows.shape) * (self.strength * scale)
        return weight

    def _add_whole(self, rows: Tensor) -> None:
        value = self._in_order(self.factors.read(self.part))
        if self.part == "set_weight":
            rows.copy_(value)
        else:
            scale = self.factors.scale(self.factors.shape("down")[0]) if self.part == "up_bias" else 1.0
            rows += value * (self.strength * scale)

    def _in_order(self, change: Tensor) -> Tensor:
        return torch.cat(change.chunk(2)[::-1]) if self.swapped else change


class Model:
    """The tensors of a model that LoRAs can change. shapes: as they are after the changes so far.

    refused: {tensor: why it cannot be changed}, of those that `takes_changes` was asked for.
    """

    def __init__(self, src: Source) -> None:
        self.src = src
        whole = any(name.startswith(MODEL_PREFIX) for name in src.tensors)
        self._tensors: dict[str, str] = {}
        for name in src.tensors:
            if not whole or name.startswith(MODEL_PREFIX):
                self._tensors[name.removesuffix(".weight")] = name
        for name in list(self._tensors):
            if name.endswith(".scale"):  # norms, which ComfyUI calls .weight when it loads the file
                self._tensors.setdefault(name.removesuffix(".scale"), self._tensors[name])
        self.names = LayerNames(self._tensors)
        self.refused: dict[str, str] = {}
        self._stored = stored_layers(src)
        self.shapes: dict[str, Shape] = {name: src.tensors[name].shape for name in self._tensors.values()}

    def tensor(self, layer: str, of: str) -> str | None:
        """The name of its weight or bias; None where it has none. of: "weight" or "bias"."""
        name = self._tensors[layer] if of == "weight" else f"{layer}.bias"
        return name if name in self.shapes else None

    def takes_changes(self, tensor: str) -> bool:
        """Whether it is stored as plain floating-point numbers."""
        layer, dtype = tensor.removesuffix(".weight"), self.src.tensors[tensor].dtype
        stored = self._stored.get(layer) if tensor != layer else None
        if stored or dtype not in FLOATS:
            form = f"quantized ({stored.format.name})" if stored else f"stored as {dtype}"
            self.refused[tensor] = f"{layer} is {form}: bake LoRAs into the 16-bit model, or dequantize it first."
        return tensor not in self.refused

    def weight_shape(self, layer: str) -> Shape:
        return self.shapes[self._tensors[layer]]
