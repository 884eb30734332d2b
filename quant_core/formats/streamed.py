"""Round-to-nearest with absmax scales on a CPU, a few rows at a time: the data stays in the cache and never exists whole in float32.

Bytes are those of `Format.quantize`, for every format whose rows depend on each other through the tensor's absmax at most.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cancel import poll
from ..numerics.metrics import relative_error
from .base import Format

_SLICE_WEIGHTS = 1 << 20


def can_slice(fmt: Format, w: Tensor) -> bool:
    return fmt.rows_are_independent and not w.is_cuda and w.numel() > 2 * _SLICE_WEIGHTS


def quantize_rows(fmt: Format, w: Tensor, measure: bool = True) -> tuple[dict[str, Tensor], float | None]:
    """w: float [N, K] on the CPU, finite -> the tensors on disk, and the relative error of the decoded weight.

    Temporaries: about 12 bytes for each of a million weights. Cancellable between slices.
    """
    shape = tuple(w.shape)
    step = max(fmt.row_multiple, _SLICE_WEIGHTS // shape[1] // fmt.row_multiple * fmt.row_multiple)
    low, high = torch.aminmax(w)
    largest = torch.maximum(low.abs(), high.abs()).to(torch.float32)
    specs = fmt.tensor_specs(shape)
    out = {spec.suffix: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
    row_axes = {spec.suffix: spec.row_axis if spec.shape else None for spec in specs}
    filled: dict[str, int] = {}
    wrong = total = 0.0
    for start in range(0, shape[0], step):
        poll()
        rows = w[start : start + step].to(torch.float32)
        work = fmt.prepare(rows)
        qp = fmt.absmax_under(work, largest)
        codes = fmt.encode(work, qp)
        if measure:
            decoded = fmt.decode(codes, qp)
            wrong += float(decoded.sub_(work).norm()) ** 2
            total += float(work.norm()) ** 2
        for suffix, part in fmt.pack(codes, qp, tuple(rows.shape)).items():
            axis = row_axes[suffix]
            if axis is None:  # the same for every slice
                out[suffix].copy_(part)
                continue
            # Slices begin at multiples of the block height and of the swizzle's tile, so parts follow each other.
            begin = filled.get(suffix, 0)
            filled[suffix] = begin + part.shape[axis]
            out[suffix].narrow(axis, begin, part.shape[axis]).copy_(part)
    if not measure:
        return out, None
    if not math.isfinite(wrong + total):  # squares of 1e20 and above
        return out, relative_error(w.to(torch.float32), fmt.dequantize(out, shape))
    return out, math.sqrt(wrong / total) if total else (math.inf if wrong else 0.0)
