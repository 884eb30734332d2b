"""Tensors that mean what a format writes but are stored otherwise: which steps lead there, decided from headers alone.

Every step is exact: the layer decodes to the same weight before and after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoint.header import TORCH_TO_CODE, TensorInfo
from ..errors import InputFileError
from ..formats.base import Format
from ..formats.records import TensorSpec
from ..numerics.packing import swizzle_scales

# {step: what it does}. The names are the repair's finding codes, too.
STEPS = {
    "scale-bytes": "stored under another one-byte dtype; the bytes are right",
    "scale-dtype": "stored as a 16- or 64-bit float; float32 is needed",
    "scale-rank": "stored with another number of dimensions",
    "flat": "stored flat, as bitsandbytes does",
    "scale-unswizzled": "block scales in plain row order; the 128x4 swizzle is needed",
}
_SAME_BYTES = {("U8", "F8_E4M3"), ("I8", "F8_E4M3"), ("F8_E8M0", "U8"), ("I8", "U8"), ("U8", "I8"), ("F8_E4M3", "U8")}
_WIDER = {("BF16", "F32"), ("F16", "F32"), ("F64", "F32")}
# Beside a layer's own tensors: one number, for the inputs.
INPUT_SCALE = TensorSpec("input_scale", torch.float32, ())


def steps_to(info: TensorInfo, spec: TensorSpec, fmt: Format, shape: tuple[int, int]) -> tuple[str, ...] | None:
    """The steps from a stored tensor to what the format writes; () when it is that already, None when none lead there.

    shape: the layer's logical [N, K].
    """
    code, steps = TORCH_TO_CODE[spec.dtype], []
    if info.dtype != code:
        if (info.dtype, code) in _SAME_BYTES:
            steps.append("scale-bytes")
        elif (info.dtype, code) in _WIDER:
            steps.append("scale-dtype")
        else:
            return None
    if tuple(info.shape) != tuple(spec.shape):
        if _without_ones(info.shape) == _without_ones(spec.shape):
            steps.append("scale-rank")
        elif spec.suffix == "weight_scale" and info.shape in _plain_grids(fmt, shape):
            steps.append("scale-unswizzled")
        elif getattr(fmt, "quant_type", "") and math.prod(info.shape) == math.prod(spec.shape):
            steps.append("flat")
        else:
            return None
    return tuple(steps)


def to_canonical(
    name: str, tensor: Tensor, info: TensorInfo, spec: TensorSpec, fmt: Format, shape: tuple[int, int]
) -> Tensor:
    """The tensor as the format writes it. Raises InputFileError, naming it, when no exact steps lead there."""
    steps = steps_to(info, spec, fmt, shape)
    if steps is None:
        raise InputFileError(
            f"{name} is {info.dtype} {list(info.shape)}; {fmt.on_disk} of a {list(shape)} weight needs "
            f"{TORCH_TO_CODE[spec.dtype]} {list(spec.shape)}. The metadata names another format than the "
            "data holds: run `quantpress repair` on the file."
        )
    if tensor.dtype != spec.dtype:
        same_bytes = "scale-bytes" in steps
        tensor = tensor.reshape(info.shape).view(spec.dtype) if same_bytes else _narrow(name, tensor, spec.dtype)
    if "scale-unswizzled" in steps:
        padded = tensor.new_zeros(_largest_grid(fmt, shape), dtype=torch.uint8)
        padded[: info.shape[0]] = tensor.view(torch.uint8)
        return swizzle_scales(padded).view(spec.dtype)
    return tensor.reshape(spec.shape)


def _narrow(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not torch.equal(cast.to(tensor.dtype), tensor):
        raise InputFileError(
            f"{name} is {tensor.dtype} and holds values that {dtype} cannot. Take the file's source instead."
        )
    return cast


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _largest_grid(fmt: Format, shape: tuple[int, int]) -> tuple[int, int]:
    return fmt.scale_grid(fmt.work_shape(shape))


def _plain_grids(fmt: Format, shape: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The shapes of unswizzled block scales, of padded and of unpadded rows; none for formats without a swizzle."""
    if fmt.pad_to == 1:
        return ()
    rows, cols = _largest_grid(fmt, shape)
    return (rows, cols), (shape[0], cols)


def shape_variants(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """The shapes as stored, then with the scale's dimensions of size 1 moved: what `format_of_layer` may know."""
    scale = shapes.get("weight_scale")
    if scale is None:
        return [dict(shapes)]
    bare = _without_ones(scale)
    others = [bare, (*bare, 1)] + ([()] if not bare else [])
    return [dict(shapes)] + [{**shapes, "weight_scale": other} for other in others if other != scale]
