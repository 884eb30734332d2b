"""Parts of a quantized weight: algorithms and encoders work on a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..numerics.metrics import relative_error
from ..numerics.scales import Granularity, QParams, shape_of
from ..numerics.slices import row_slices
from .base import Format

# Weights worked on at once: they stay in a CPU's cache. On a GPU fewer launches count more, and a slice bounds memory.
_SLICE = {"cpu": 1 << 19, "cuda": 1 << 21}
_STREAMED_SLICE = 1 << 20


def tile(fmt: Format, qp: QParams, work_shape: tuple[int, int], rows: slice, cols: slice) -> QParams:
    """The QParams of work[rows, cols]; every method of `fmt` takes them with that smaller weight.

    rows and cols have explicit ends, and respect the blocks: groups begin and end at the slice's borders.
    """
    bn, bk = fmt.block(work_shape)
    row_blocks = rows if fmt.granularity in (Granularity.ROW, Granularity.GROUP) else _blocks(rows, bn, fmt)
    col_blocks = _blocks(cols, bk, fmt) if fmt.granularity in (Granularity.GROUP, Granularity.BLOCK) else slice(None)
    parent = qp.parent if qp.parent is None or qp.parent.dim() == 0 else qp.parent[row_blocks]
    zero = None if qp.zero is None else qp.zero[row_blocks, col_blocks]
    return QParams(qp.scale[row_blocks, col_blocks], parent, zero, qp.codebook)


def _blocks(part: slice, size: int, fmt: Format) -> slice:
    if fmt.granularity is Granularity.TENSOR:
        return slice(None)
    if part.start % size or part.stop % size:
        raise ValueError(f"{fmt.name}: slice {part.start}..{part.stop} cuts blocks of {size}")
    return slice(part.start // size, part.stop // size)


def block_row_slices(fmt: Format, work: Tensor) -> Iterator[slice]:
    """Slices of whole block rows, of a size that suits the device."""
    return row_slices(shape_of(work), _SLICE.get(work.device.type, _SLICE["cuda"]), fmt.block_rows)


def _row_tiles(fmt: Format, work: Tensor, qp: QParams) -> Iterator[tuple[slice, QParams]]:
    shape = shape_of(work)
    for rows in block_row_slices(fmt, work):
        yield rows, tile(fmt, qp, shape, rows, slice(0, shape[1]))


def encode_rows(fmt: Format, work: Tensor, qp: QParams) -> Tensor:
    """fmt.encode, a slice of rows at a time: on a GPU the whole weight at once takes up to four copies of it."""
    parts = [fmt.encode(work[rows], part) for rows, part in _row_tiles(fmt, work, qp)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def errors_by_rows(
    fmt: Format, work: Tensor, codes: Tensor | None, qp: QParams, plain: Tensor | None = None
) -> Iterator[Tensor]:
    """What a reader decodes minus `work`, a slice of rows at a time.

    codes None: those of rounding `plain` (None: work) to nearest.
    """
    plain = work if plain is None else plain
    for rows, part in _row_tiles(fmt, work, qp):
        yield (fmt.round(plain[rows], part) if codes is None else fmt.decode(codes[rows], part)).sub_(work[rows])


def group_columns(fmt: Format, work_shape: tuple[int, int]) -> int:
    """How many columns share a scale: the group size, or K."""
    return fmt.block(work_shape)[1]


# ---- round to nearest with absmax scales on a CPU: the weight never exists whole in float32 ---------------------
def can_stream(fmt: Format, w: Tensor) -> bool:
    """Whether `quantize_streamed` takes the weight, and it is large enough to pay."""
    return fmt.rows_are_independent and not w.is_cuda and w.numel() > 2 * _STREAMED_SLICE


def quantize_streamed(fmt: Format, w: Tensor, measure: bool = True) -> tuple[dict[str, Tensor], float | None]:
    """w: float [N, K] on the CPU, finite -> the tensors on disk, and the relative error of the decoded weight.

    Bytes are those of `Format.quantize`, for every format whose rows depend on each other through the tensor's absmax
    at most. Temporaries: about 12 bytes for each of a million weights. Cancellable between slices.
    """
    shape = shape_of(w)
    low, high = torch.aminmax(w)
    largest = torch.maximum(low.abs(), high.abs()).to(torch.float32)
    file = _Assembled(fmt, shape)
    wrong = total = 0.0
    for rows in row_slices(shape, _STREAMED_SLICE, fmt.row_multiple):
        plain = w[rows].to(torch.float32)
        work = fmt.prepare(plain)
        qp = fmt.absmax_under(work, largest)
        codes = fmt.encode(work, qp)
        if measure:
            decoded = fmt.decode(codes, qp)
            wrong += float(decoded.sub_(work).norm()) ** 2
            total += float(work.norm()) ** 2
        file.append(fmt.pack(codes, qp, shape_of(plain)))
    if not measure:
        return file.tensors, None
    if not math.isfinite(wrong + total):  # squares of 1e20 and above
        return file.tensors, relative_error(w.to(torch.float32), fmt.dequantize(file.tensors, shape))
    return file.tensors, math.sqrt(wrong / total) if total else (math.inf if wrong else 0.0)


@dataclass
class _Assembled:
    """A layer's tensors on disk, filled from slices of rows in their order."""

    fmt: Format
    shape: tuple[int, int]
    tensors: dict[str, Tensor] = field(init=False)
    _filled: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._specs = {spec.suffix: spec for spec in self.fmt.tensor_specs(self.shape)}
        self.tensors = {spec.suffix: torch.empty(spec.shape, dtype=spec.dtype) for spec in self._specs.values()}

    def append(self, parts: dict[str, Tensor]) -> None:
        for suffix, part in parts.items():
            axis = self._specs[suffix].row_axis if self._specs[suffix].shape else None
            if axis is None:  # the same for every slice
                self.tensors[suffix].copy_(part)
                continue
            # Slices begin at multiples of the block height and of the swizzle's tile, so parts follow each other.
            begin = self._filled.get(suffix, 0)
            self._filled[suffix] = begin + part.shape[axis]
            self.tensors[suffix].narrow(axis, begin, part.shape[axis]).copy_(part)
