"""Row and column slices of a quantized weight, so that algorithms can work on a part of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..numerics.scales import Granularity, QParams
from .base import Format

# Weights worked on at once: they stay in a CPU's cache; on a GPU fewer launches count more, and memory is what a slice bounds.
_SLICE = {"cpu": 1 << 19, "cuda": 1 << 21}


def tile(fmt: Format, qp: QParams, work_shape: tuple[int, int], rows: slice, cols: slice) -> QParams:
    """The QParams of work[rows, cols]; every method of `fmt` takes them with that smaller weight.

    rows and cols have explicit ends, and respect the blocks: groups begin and end at the slice's borders.
    """
    bn, bk = fmt.block(work_shape)
    row_blocks = rows if fmt.granularity in (Granularity.ROW, Granularity.GROUP) else _blocks(rows, bn, fmt)
    col_blocks = _blocks(cols, bk, fmt) if fmt.granularity in (Granularity.GROUP, Granularity.BLOCK) else slice(None)
    part = lambda t: None if t is None else t[row_blocks, col_blocks]  # noqa: E731
    parent = qp.parent if qp.parent is None or qp.parent.dim() == 0 else qp.parent[row_blocks]
    return replace(qp, scale=part(qp.scale), zero=part(qp.zero), parent=parent)


def _blocks(part: slice, size: int, fmt: Format) -> slice:
    if fmt.granularity is Granularity.TENSOR:
        return slice(None)
    if part.start % size or part.stop % size:
        raise ValueError(f"{fmt.name}: slice {part.start}..{part.stop} cuts blocks of {size}")
    return slice(part.start // size, part.stop // size)


def row_slices(fmt: Format, work: Tensor) -> Iterator[slice]:
    """Slices of whole block rows, of a size that suits the device."""
    n, k = work.shape
    unit = fmt.block((n, k))[0] if fmt.granularity is Granularity.BLOCK else 1
    step = max(1, _SLICE.get(work.device.type, _SLICE["cuda"]) // (k * unit)) * unit
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def encode_rows(fmt: Format, work: Tensor, qp: QParams) -> Tensor:
    """fmt.encode, a slice of rows at a time: on a GPU the whole weight at once takes up to four copies of it."""
    parts = [
        fmt.encode(work[rows], tile(fmt, qp, tuple(work.shape), rows, slice(0, work.shape[1])))
        for rows in row_slices(fmt, work)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def errors_by_rows(
    fmt: Format, work: Tensor, codes: Tensor | None, qp: QParams, plain: Tensor | None = None
) -> Iterator[Tensor]:
    """What a reader decodes minus `work`, a slice of rows at a time. codes None: those of rounding `plain` (None: work) to nearest."""
    plain = work if plain is None else plain
    for rows in row_slices(fmt, work):
        sub = tile(fmt, qp, tuple(work.shape), rows, slice(0, work.shape[1]))
        yield (fmt.round(plain[rows], sub) if codes is None else fmt.decode(codes[rows], sub)).sub_(work[rows])


def group_columns(fmt: Format, work_shape: tuple[int, int]) -> int:
    """How many columns share a scale: the group size, or K."""
    return fmt.block(work_shape)[1]
