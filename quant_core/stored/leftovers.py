"""Quantization tensors that belong to no quantized layer: left behind by a tool that decoded, or lost their weight.

In a new file they would stand beside other scales under the same name, or count as the inputs' scale of a layer that
never had one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.header import CODE_TO_TORCH
from ..checkpoint.source import Source
from .form import Form
from .layers import StoredLayer
from .legacy import CODED, INVERSE, LEGACY_NAMES, is_marker
from .suffixes import QUANT_SUFFIXES

_OWN = tuple(suffix for suffix in QUANT_SUFFIXES if suffix != "weight")
_SUFFIXES = (*_OWN, *LEGACY_NAMES, INVERSE)
_SCALES = ("weight_scale", "scale_weight", INVERSE)
_FOR_THE_INPUTS = ("input_scale", "scale_input", "weight_scalar")
_FLOATS = ("F32", "F16", "BF16")
_SAMPLE_BYTES = 2**20
_AGAIN = "Take the file from its source again."


@dataclass(frozen=True, slots=True)
class Leftovers:
    """markers: of the legacy form. stray: what serves nothing. problems: sentences about what may serve something."""

    markers: tuple[str, ...]
    stray: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        """All that a new file leaves out."""
        return frozenset((*self.markers, *self.stray))


def leftovers(src: Source, stored: Mapping[str, StoredLayer]) -> Leftovers:
    """Reads scales, and a part of a weight where a scale makes one doubt that the weight is whole."""
    consumed = {name for layer in stored.values() for name in layer.names.values()}
    markers, stray, problems = [], [], []
    for name in src.tensors:
        layer, _, last = name.rpartition(".")
        if is_marker(name):
            markers.append(name)
        elif last in _SUFFIXES and name not in consumed:
            if last in LEGACY_NAMES and f"{layer}.weight" not in src.tensors:
                continue  # an ordinary tensor that happens to be called so
            problem = _problem(src, stored.get(layer), name)
            if problem is None:
                stray.append(name)
            else:
                problems.append(problem)
    return Leftovers(tuple(markers), tuple(stray), tuple(problems))


def _problem(src: Source, stored: StoredLayer | None, name: str) -> str | None:
    """Why the tensor cannot be left out; None when it can."""
    layer, _, last = name.rpartition(".")
    weight = src.tensors.get(f"{layer}.weight")
    if weight is None:
        return f"{name} has no weight beside it. {_AGAIN}"
    if last in _FOR_THE_INPUTS:
        return None
    if stored is not None:
        return _beside_another(src, stored, name)
    if weight.dtype in CODED:
        return f"{name} stands beside a {weight.dtype} weight, and no known format is stored so. {_AGAIN}"
    values = src.read(name)
    if last == "pre_quant_scale" and not _is_one(values):
        return (
            f"{name} multiplies the inputs of a {weight.dtype} weight, which ComfyUI does not do. Take a file into "
            "whose weights it is multiplied."
        )
    if last in _SCALES and not _is_one(values) and _may_be_codes(src, weight.name):
        return (
            f"{weight.name} is {weight.dtype} and holds nothing but FP8 or INT8 codes, and {name} is not 1: the codes "
            f"may have been cast without their scale. {_AGAIN}"
        )
    return None


def _beside_another(src: Source, stored: StoredLayer, name: str) -> str | None:
    """Of a layer that is quantized and whole without this tensor."""
    last = name.rpartition(".")[2]
    used = stored.names.get("weight_scale")
    if last not in _SCALES or stored.form is Form.COMFY_QUANT or used is None:
        return None
    one, other = src.read(used), src.read(name)
    if one.numel() == other.numel() and torch.equal(one.reshape(-1).float(), other.reshape(-1).float()):
        return None
    return f"{stored.layer} has two scales that differ, {used} and {name}. {_AGAIN}"


def _is_one(values: Tensor) -> bool:
    return values.is_floating_point() and bool((values.to(torch.float32) == 1).all())


def _may_be_codes(src: Source, name: str) -> bool:
    """Whether the first MiB of a 16- or 32-bit weight could be FP8 or INT8 codes that were cast."""
    info = src.tensors[name]
    if info.dtype not in _FLOATS:
        return False
    chunk = next(src.copy_chunks(name, _SAMPLE_BYTES), bytearray())
    w = torch.frombuffer(chunk, dtype=CODE_TO_TORCH[info.dtype]).to(torch.float32) if chunk else torch.zeros(1)
    # Codes fill the range of their dtype, decoded weights are small.
    if not float(w.abs().max()) >= 8:
        return False
    grids = (w.to(torch.float8_e4m3fn), w.to(torch.float8_e5m2), w.round().clamp(-128, 127))
    return any(torch.equal(w, grid.to(torch.float32)) for grid in grids)
