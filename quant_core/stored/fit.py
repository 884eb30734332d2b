"""What a format writes for a layer, and what a file holds in its place: asked here, and nowhere else.

The steps from the one to the other follow from headers alone. Every step is exact: the layer decodes to the same
weight before and after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ..checkpoint.header import TORCH_TO_CODE, TensorInfo
from ..errors import InputFileError
from ..formats.base import Format
from ..formats.families.codebook import CodebookFormat
from ..formats.records import TensorSpec
from ..numerics.packing import swizzle_scales

# Beside a layer's own tensors: one number, for the inputs.
INPUT_SCALE = TensorSpec("input_scale", torch.float32, ())
_SAME_BYTES = {("U8", "F8_E4M3"), ("I8", "F8_E4M3"), ("F8_E8M0", "U8"), ("I8", "U8"), ("U8", "I8"), ("F8_E4M3", "U8")}
_WIDER = {("BF16", "F32"), ("F16", "F32"), ("F64", "F32")}


class Step(Enum):
    """Why a tensor is not stored as its format writes it. The value is the code of repair's finding."""

    BYTES = "scale-bytes"
    DTYPE = "scale-dtype"
    RANK = "scale-rank"
    FLAT = "flat"
    SWIZZLE = "scale-unswizzled"
    REORDER = "modelopt-order"  # no finding: repair calls the whole layer's form older

    @property
    def keeps_bytes(self) -> bool:
        """Whether the stored bytes are right as they are, under another dtype or shape."""
        return self in (Step.BYTES, Step.RANK, Step.FLAT)


# What repair says of each.
WORDS = {
    Step.BYTES: "stored under another one-byte dtype; the bytes are right",
    Step.DTYPE: "stored as a 16- or 64-bit float; float32 is needed",
    Step.RANK: "stored with another number of dimensions",
    Step.FLAT: "stored flat, as bitsandbytes does",
    Step.SWIZZLE: "block scales in plain row order; the 128x4 swizzle is needed",
}


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that a format writes for a layer, and what a file holds in its place.

    owner: what needs it, in words: the format and the weight's shape. steps: from what was found to what the format
    writes. () when it is that already, None when no exact steps lead there.
    """

    spec: TensorSpec
    found: TensorInfo
    owner: str
    steps: tuple[Step, ...] | None

    @property
    def keeps_bytes(self) -> bool:
        """Whether the bytes that were found are those that the format writes."""
        return self.steps is not None and all(step.keeps_bytes for step in self.steps)

    @property
    def difference(self) -> str:
        """What was found and what is needed, as a sentence without its full stop."""
        found, code = self.found, TORCH_TO_CODE[self.spec.dtype]
        return f"{found.name} is {found.dtype} {list(found.shape)}; {self.owner} needs {code} {list(self.spec.shape)}"

    def convert(self, tensor: Tensor) -> Tensor:
        """The tensor that was found, as the format writes it. Raises InputFileError when no exact steps lead there."""
        if self.steps is None:
            raise self.error()
        if tensor.dtype != self.spec.dtype:
            if Step.BYTES in self.steps:
                tensor = tensor.reshape(self.found.shape).view(self.spec.dtype)
            else:
                tensor = _narrow(self.found.name, tensor, self.spec.dtype)
        if Step.SWIZZLE in self.steps:
            return swizzle_scales(tensor.view(torch.uint8)).view(self.spec.dtype)
        return tensor.reshape(self.spec.shape)

    def error(self, where: str = "") -> InputFileError:
        """where: what stands before the tensor's name, such as "model.safetensors: "."""
        return InputFileError(
            f"{where}{self.difference}. The metadata names another format than the data holds: run "
            "`quantpress repair` on the file."
        )


@dataclass(frozen=True, slots=True)
class LayerFit:
    """parts: {suffix: part} of what was found, in the format's order. missing: what the format writes besides."""

    parts: Mapping[str, Part]
    missing: tuple[TensorSpec, ...]


def fit_layer(fmt: Format, shape: tuple[int, int], infos: Mapping[str, TensorInfo]) -> LayerFit:
    """The tensors that belong to a layer, and whether they fit.

    shape: logical [N, K]. infos: {suffix: header entry}.
    """
    specs = fmt.tensor_specs(shape)
    parts = {spec.suffix: fit(spec, infos[spec.suffix], fmt, shape) for spec in specs if spec.suffix in infos}
    return LayerFit(parts, tuple(spec for spec in specs if spec.suffix not in infos))


def fit(spec: TensorSpec, found: TensorInfo, fmt: Format, shape: tuple[int, int]) -> Part:
    return Part(spec, found, f"{fmt.on_disk} of a {list(shape)} weight", _steps(spec, found, fmt, shape))


def _steps(spec: TensorSpec, info: TensorInfo, fmt: Format, shape: tuple[int, int]) -> tuple[Step, ...] | None:
    code, steps = TORCH_TO_CODE[spec.dtype], []
    if info.dtype != code:
        if (info.dtype, code) in _SAME_BYTES:
            steps.append(Step.BYTES)
        elif (info.dtype, code) in _WIDER:
            steps.append(Step.DTYPE)
        else:
            return None
    if tuple(info.shape) != tuple(spec.shape):
        if _without_ones(info.shape) == _without_ones(spec.shape):
            steps.append(Step.RANK)
        elif spec.suffix == "weight_scale" and info.shape in _plain_grids(fmt, shape):
            steps.append(Step.SWIZZLE)
        elif isinstance(fmt, CodebookFormat) and math.prod(info.shape) == math.prod(spec.shape):
            steps.append(Step.FLAT)
        else:
            return None
    return tuple(steps)


def _narrow(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not torch.equal(cast.to(tensor.dtype), tensor):
        raise InputFileError(
            f"{name} is {tensor.dtype} and holds values that {dtype} cannot. Take the file's source instead."
        )
    return cast


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _plain_grids(fmt: Format, shape: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The shapes of unswizzled block scales, of padded and of unpadded rows; none for formats without a swizzle."""
    if fmt.pad_to == 1:
        return ()
    rows, cols = fmt.scale_grid(fmt.work_shape(shape))
    return (rows, cols), (shape[0], cols)


def shape_variants(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """The shapes as stored, then with the scale's dimensions of size 1 moved: what `format_of_layer` may know."""
    scale = shapes.get("weight_scale")
    if scale is None:
        return [dict(shapes)]
    bare = _without_ones(scale)
    others = [bare, (*bare, 1)] + ([()] if not bare else [])
    return [dict(shapes)] + [{**shapes, "weight_scale": other} for other in others if other != scale]
