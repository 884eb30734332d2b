"""Per scale block, the storable scale with the smallest rounding error, weighted by the inputs where they are known.

Without data the error is the weight's own, and clipping a few large weights looks cheap. Where they sit in the column of
a strong channel the OUTPUT suffers: up to 3.2 times that of absmax scales (int8_blockwise) on a trained text encoder. So no
column's error may rise much: if none does, no uncorrelated inputs can make the output worse. Guarded, that layer ends at
1.06, and the median over 46 trained layers stays (nvfp4 0.87, nf4 0.90).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...formats.tiles import errors_by_rows, row_slices, tile
from ...numerics.elements import FloatElement
from ...numerics.scales import QParams, ScaleDtype, block_view
from ...numerics.triton_kernels import runs_triton
from ..task import Task

_PARENT_MULTIPLES = (1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875)  # an octave: E4M3 repeats itself beyond
_PARENT_ROWS, _PARENT_STEPS = 256, range(-3, 2)  # rows and neighbours sampled for it
_COARSE = tuple(1.1 - 0.05 * i for i in range(17))  # 1.1 down to 0.3
_SMALL_BLOCK, _SMALL_COARSE = 256, 11  # small blocks never want less than 0.6
# A float grid repeats itself an octave up, where nothing clips: where the weights fall on it counts, so many are tried.
_OCTAVE = tuple(2.0 ** (-i / 20) * 2 for i in range(20)) + tuple(0.95 - 0.05 * i for i in range(10))
_FINE = (0.95, 1.05, 0.975, 1.025, 0.9875, 1.0125)
_NEIGHBOURS = {ScaleDtype.E4M3: range(-8, 9), ScaleDtype.E8M0: range(-3, 2)}
_GUARD_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """search_refits: least-squares refinements after the search, 0 or more.

    search_guard: how far a column's squared error may rise above that of absmax scales when nothing is known of the
    inputs; columns that rise further count more in a second and third search. 0: they may rise without limit.
    """

    search_refits: int = field(default=3, metadata={"low": 0, "high": 50})
    search_guard: float = field(default=1.25, metadata={"low": 0.0, "high": 1000.0})


def choose(task: Task) -> QParams:
    """Starts from absmax scales, and accepts only what lowers a block's error, so it never ends above them."""
    from ..options import read_options

    options = read_options(SearchOptions, task.options)
    base = task.fmt.absmax(task.work)
    found = _search(task, base, options)
    if task.weights is not None or not options.search_guard:
        return found
    allowed = options.search_guard * _column_errors(task, base)
    weights = torch.ones_like(allowed)
    for _ in range(_GUARD_ROUNDS):
        excess = torch.where(allowed > 0, _column_errors(task, found) / allowed, 1.0)
        if float(excess.max()) <= 1:
            break
        weights *= excess.clamp(min=1).square()
        found = _search(replace(task, weights=weights), base, options)
    return found


def _search(task: Task, base: QParams, options: SearchOptions) -> QParams:
    if base.parent is not None and base.parent.dim() == 0:
        base = _choose_parent(task, base)
    return refine(task, base, options.search_refits)


def _column_errors(task: Task, qp: QParams) -> Tensor:
    """Squared error of rounding to nearest, summed over each column, float32 [Kp]."""
    return sum(error.square_().sum(dim=0) for error in errors_by_rows(task.fmt, task.work, None, qp))


def refine(task: Task, base: QParams, refits: int) -> QParams:
    """The best scales found around `base`, under its parent; each block ends at its base's error or below."""
    best = _Best(task, base)
    steps = _NEIGHBOURS.get(task.fmt.scale_dtype)
    for candidate in _multiples(task, base, steps):
        best.offer(candidate)
    for factor in _FINE if steps is None else ():
        best.offer(task.fmt.qparams(best.qp.effective() * factor, like=best.qp))
    for _ in range(refits):
        best.offer(least_squares(task, best.qp))
    return best.qp


class _Best:
    """The best scale of each block so far."""

    def __init__(self, task: Task, qp: QParams) -> None:
        self.task, self.qp, self.loss = task, qp, block_loss(task, qp)

    def offer(self, candidate: QParams) -> None:
        self.task.poll()
        loss = block_loss(self.task, candidate)
        self.qp = merge(loss < self.loss, candidate, self.qp)
        self.loss = torch.minimum(loss, self.loss)


def merge(mask: Tensor, one: QParams, other: QParams) -> QParams:
    """Per block `one` where mask [NB, KB], else `other`; both under the same parent."""
    zero = None if one.zero is None else torch.where(mask, one.zero, other.zero)
    return replace(other, scale=torch.where(mask, one.scale, other.scale), zero=zero)


def block_loss(task: Task, qp: QParams) -> Tensor:
    """Squared (weighted) rounding error of each block, float32 [NB, KB]."""
    fmt, shape, weights = task.fmt, task.shape, task.weights
    if (sums := _fused_sums(task, qp)) is not None:
        return sums[0]
    parts = []
    for rows in row_slices(fmt, task.work):
        part = task.work[rows]
        error = fmt.round(part, tile(fmt, qp, shape, rows, slice(0, shape[1]))).sub_(part).square_()
        if weights is not None:
            error *= weights
        parts.append(block_view(error, fmt.block(tuple(part.shape))).sum(dim=(1, 3)))
    # One scale for the whole tensor: every slice holds a share of the same block.
    return sum(parts) if fmt.block(shape)[0] == shape[0] and len(parts) > 1 else torch.cat(parts)


def _fused_sums(task: Task, qp: QParams) -> Tensor | None:
    """search_triton.block_sums, or None where it cannot run: on a CPU, and for grids with zero points or own codebooks."""
    if not runs_triton(task.work.device):
        return None
    levels = task.fmt.levels(task.work.device)
    if levels is None:
        return None
    from .search_triton import block_sums

    return block_sums(task.work, qp.effective(), levels, task.weights, task.fmt.block(task.shape))


def _multiples(task: Task, base: QParams, steps: Sequence[int] | None) -> Iterator[QParams]:
    """steps: how many representable values to move by, for coarse stored scales; None for multiples."""
    if steps is None:
        effective = base.effective()
        rows, cols = task.fmt.block(task.shape)
        coarse = _COARSE[:_SMALL_COARSE] if rows * cols <= _SMALL_BLOCK else _COARSE
        coarse = _OCTAVE if isinstance(task.fmt.element, FloatElement) else coarse
        for multiple in (*coarse, *(-m for m in coarse)) if task.fmt.signed_scales else coarse:
            yield task.fmt.qparams(effective * multiple, like=base)
        return
    for step in steps:
        if step:
            yield replace(base, scale=neighbour(base.scale, task.fmt.scale_dtype, step))


def neighbour(scale: Tensor, dtype: ScaleDtype, step: int) -> Tensor:
    """Stored scales moved by `step` representable values, staying positive and finite; a scale of 0 stays 0."""
    if dtype is ScaleDtype.E8M0:
        moved = (scale * 2.0**step).clamp(2.0**-126, 2.0**126)
    else:
        code = scale.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16) + step
        moved = code.clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    return torch.where(scale > 0, moved, scale)


def _choose_parent(task: Task, base: QParams) -> QParams:
    """The scale of the whole tensor decides which block scales exist: try an octave of it on a sample of rows."""
    n = task.shape[0]
    rows = torch.linspace(0, n - 1, min(n, _PARENT_ROWS)).round().long().to(task.work.device)
    sample = replace(task, work=task.work[rows].contiguous())
    effective, best = base.effective(), None
    for multiple in _PARENT_MULTIPLES:
        parent = base.parent * multiple
        start = task.fmt.qparams(effective[rows], like=replace(base, scale=base.scale[rows], parent=parent))
        found = _Best(sample, start)
        for candidate in _multiples(sample, start, _PARENT_STEPS):
            found.offer(candidate)
        loss = float(found.loss.sum(dtype=torch.float64))
        if best is None or loss < best[0]:
            best = (loss, parent)
    return task.fmt.qparams(effective, like=replace(base, parent=best[1])) if best[1] is not base.parent else base


def least_squares(task: Task, qp: QParams, rounded: Tensor | None = None) -> QParams:
    """The scales (and zero points) that fit best the codes of `rounded` (float32 [Np, Kp], on the grid of `qp`).

    None: the codes that rounding to nearest gives.
    """
    fmt, shape, weights = task.fmt, task.shape, task.weights
    if rounded is None and (fused := _fused_sums(task, qp)) is not None:
        return _solve(task, qp, fused[1], fused[2])
    sums = []
    for rows in row_slices(fmt, task.work):
        part = task.work[rows]
        sub = tile(fmt, qp, shape, rows, slice(0, shape[1]))
        block = fmt.block(tuple(part.shape))
        scale = sub.effective()[:, None, :, None]
        near = fmt.round(part, sub) if rounded is None else rounded[rows]
        target, value = block_view(part, block), block_view(near, block)
        if sub.zero is not None:
            value = value - sub.zero[:, None, :, None]
        unit = torch.where(scale == 0, torch.zeros_like(value), value / scale)
        weight = torch.ones_like(part[0]) if weights is None else weights
        weight = weight.view(1, 1, -1, block[1])
        sums.append(
            torch.stack(
                [
                    (weight * x).sum(dim=(1, 3))
                    for x in (unit * unit, unit * target, unit, torch.ones_like(unit), target)
                ]
            )
        )
    total = sum(sums) if fmt.block(shape)[0] == shape[0] and len(sums) > 1 else torch.cat(sums, dim=1)
    return _solve(task, qp, *total)


def _solve(task: Task, qp: QParams, cc: Tensor, cw: Tensor, *more: Tensor) -> QParams:
    """Least squares of target = scale * unit (+ zero) from the sums of unit^2, unit * target, and with zero points also of
    unit, 1 and target; blocks that determine none keep theirs."""
    if qp.zero is None:
        scale, effective = cw / cc, qp.effective()
        return task.fmt.qparams(torch.where((cc > 0) & (scale * effective > 0), scale, effective), like=qp)
    c, one, w = more
    det = cc * one - c * c
    scale, zero = (cw * one - c * w) / det, (cc * w - c * cw) / det
    good = (det > 1e-6 * cc * one) & (scale > 0)
    return task.fmt.qparams(
        torch.where(good, scale, qp.effective()), like=replace(qp, zero=torch.where(good, zero, qp.zero))
    )
