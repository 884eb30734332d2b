"""Per scale block, the storable scale with the smallest rounding error, weighted by the inputs where they are known.

Without data the error is the weight's own, and clipping a few large weights looks cheap. Where they sit in the column
of a strong channel, the OUTPUT suffers: its error was up to 3.2 times that of absmax scales (int8_blockwise, a trained
text encoder). So no column's error may rise much. If none does, no uncorrelated inputs can make the output worse.
Guarded, that layer ends at 1.06 times, and the median over 46 trained layers stays (nvfp4 0.87, nf4 0.90).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...cancel import poll
from ...formats.slices import block_row_slices, errors_by_rows, tile
from ...numerics.scales import QParams, block_view
from ...numerics.triton_kernels import runs_triton
from ..options import setting
from ..task import ScaleTask
from .base import Chooser

_PARENT_MULTIPLES = (1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875)  # an octave: E4M3 repeats itself beyond
_PARENT_ROWS, _PARENT_STEPS = 256, range(-3, 2)  # rows and neighbours sampled for it
_COARSE = tuple(1.1 - 0.05 * i for i in range(17))  # 1.1 down to 0.3
_SMALL_BLOCK, _SMALL_COARSE = 256, 11  # small blocks never want less than 0.6
# A float grid repeats itself an octave up, where nothing clips. What counts is where the weights fall on it: try many.
_OCTAVE = tuple(2.0 ** (-i / 20) * 2 for i in range(20)) + tuple(0.95 - 0.05 * i for i in range(10))
_FINE = (0.95, 1.05, 0.975, 1.025, 0.9875, 1.0125)
_GUARD_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Search(Chooser):
    """refits: least-squares refinements after the search.

    guard: how far a column's squared error may rise above that of absmax scales when nothing is known of the inputs.
    Columns that rise further count more in a second and third search. 0: they may rise without limit.
    """

    name: ClassVar[str] = "search"
    explain: ClassVar[str] = (
        "tries several per block and keeps the best, a few times slower. Without a calibration that is the best for "
        "the weights alone: in layers with strong input channels the error of what comes out can rise, and 'absmax' "
        "is safer there."
    )
    refits: int = setting(3, low=0, high=50, option="search_refits")
    guard: float = setting(1.25, low=0.0, high=1000.0, option="search_guard")

    def choose(self, task: ScaleTask) -> QParams:
        """Starts from absmax scales, and accepts only what lowers a block's error, so it never ends above them."""
        base = task.fmt.absmax(task.work)
        found = _search(task, base, self.refits)
        if task.weights is not None or not self.guard:
            return found
        allowed = self.guard * _column_errors(task, base)
        weights = torch.ones_like(allowed)
        for _ in range(_GUARD_ROUNDS):
            excess = torch.where(allowed > 0, _column_errors(task, found) / allowed, 1.0)
            if float(excess.max()) <= 1:
                break
            weights *= excess.clamp(min=1).square()
            found = _search(replace(task, weights=weights), base, self.refits)
        return found


def _search(task: ScaleTask, base: QParams, refits: int) -> QParams:
    if base.parent is not None and base.parent.dim() == 0:
        base = _with_best_parent(task, base, base.parent)
    return refine(task, base, refits)


def _column_errors(task: ScaleTask, qp: QParams) -> Tensor:
    """Squared error of rounding to nearest, summed over each column, float32 [Kp]."""
    return _total([error.square_().sum(dim=0) for error in errors_by_rows(task.fmt, task.work, None, qp)])


def _total(parts: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def refine(task: ScaleTask, base: QParams, refits: int) -> QParams:
    """The best scales found around `base`, under its parent; each block ends at its base's error or below."""
    best = _Best(task, base)
    steps = task.fmt.scale_dtype.searched
    for candidate in _multiples(task, base, steps):
        best.offer(candidate)
    for factor in _FINE if steps is None else ():
        best.offer(task.fmt.qparams(best.qp.effective() * factor, like=best.qp))
    for _ in range(refits):
        best.offer(least_squares(task, best.qp))
    return best.qp


class _Best:
    """The best scale of each block so far."""

    def __init__(self, task: ScaleTask, qp: QParams) -> None:
        self.task, self.qp, self.loss = task, qp, block_loss(task, qp)

    def offer(self, candidate: QParams) -> None:
        poll()
        loss = block_loss(self.task, candidate)
        self.qp = merge(loss < self.loss, candidate, self.qp)
        self.loss = torch.minimum(loss, self.loss)


def merge(mask: Tensor, one: QParams, other: QParams) -> QParams:
    """Per block `one` where mask [NB, KB], else `other`; both under the same parent."""
    zero = other.zero if one.zero is None or other.zero is None else torch.where(mask, one.zero, other.zero)
    return replace(other, scale=torch.where(mask, one.scale, other.scale), zero=zero)


def block_loss(task: ScaleTask, qp: QParams) -> Tensor:
    """Squared (weighted) rounding error of each block, float32 [NB, KB]."""
    fmt, shape, weights = task.fmt, task.shape, task.weights
    if (sums := _fused_sums(task, qp)) is not None:
        return sums[0]
    parts = []
    for rows in block_row_slices(fmt, task.work):
        part = task.work[rows]
        error = fmt.round(part, tile(fmt, qp, shape, rows, slice(0, shape[1]))).sub_(part).square_()
        if weights is not None:
            error *= weights
        parts.append(block_view(error, fmt.block((part.shape[0], part.shape[1]))).sum(dim=(1, 3)))
    # One scale for the whole tensor: every slice holds a share of the same block.
    return _total(parts) if fmt.block(shape)[0] == shape[0] and len(parts) > 1 else torch.cat(parts)


def _fused_sums(task: ScaleTask, qp: QParams) -> Tensor | None:
    """search_triton.block_sums. None where it cannot run: on a CPU, for grids with zero points or own codebooks."""
    if not runs_triton(task.work.device):
        return None
    levels = task.fmt.levels(task.work.device)
    if levels is None:
        return None
    from .search_triton import block_sums

    return block_sums(task.work, qp.effective(), levels, task.weights, task.fmt.block(task.shape))


def _multiples(task: ScaleTask, base: QParams, steps: Sequence[int] | None) -> Iterator[QParams]:
    """steps: how many representable values to move by, for coarse stored scales; None for multiples."""
    if steps is None:
        effective = base.effective()
        rows, cols = task.fmt.block(task.shape)
        coarse = _COARSE[:_SMALL_COARSE] if rows * cols <= _SMALL_BLOCK else _COARSE
        coarse = _OCTAVE if task.fmt.element.repeats_by_octave else coarse
        for multiple in (*coarse, *(-m for m in coarse)) if task.fmt.signed_scales else coarse:
            yield task.fmt.qparams(effective * multiple, like=base)
        return
    for step in steps:
        if step:
            yield replace(base, scale=task.fmt.scale_dtype.neighbour(base.scale, step))


def _with_best_parent(task: ScaleTask, base: QParams, parent: Tensor) -> QParams:
    """The scale of the whole tensor decides which block scales exist: try an octave of it on a sample of rows.

    parent: float32 (), that of `base`.
    """
    n = task.shape[0]
    rows = torch.linspace(0, n - 1, min(n, _PARENT_ROWS)).round().long().to(task.work.device)
    sample = replace(task, work=task.work[rows].contiguous())
    effective = base.effective()
    losses: list[float] = []
    for multiple in _PARENT_MULTIPLES:
        like = replace(base, scale=base.scale[rows], parent=parent * multiple)
        start = task.fmt.qparams(effective[rows], like=like)
        found = _Best(sample, start)
        for candidate in _multiples(sample, start, _PARENT_STEPS):
            found.offer(candidate)
        losses.append(float(found.loss.sum(dtype=torch.float64)))
    best = parent * _PARENT_MULTIPLES[losses.index(min(losses))]
    return task.fmt.qparams(effective, like=replace(base, parent=best))


def least_squares(task: ScaleTask, qp: QParams, rounded: Tensor | None = None) -> QParams:
    """The scales (and zero points) that fit best the codes of `rounded` (float32 [Np, Kp], on the grid of `qp`).

    None: the codes that rounding to nearest gives.
    """
    if rounded is None and (fused := _fused_sums(task, qp)) is not None:
        return _fit_scale(task, qp, fused[1], fused[2])
    fmt, shape = task.fmt, task.shape
    parts = [_sums_of_rows(task, qp, rounded, rows) for rows in block_row_slices(fmt, task.work)]
    whole_columns = fmt.block(shape)[0] == shape[0]  # then every slice holds a share of the same blocks
    sums = Sums(*(_total(parts) if whole_columns and len(parts) > 1 else torch.cat(parts, dim=1)))
    if qp.zero is None:
        return _fit_scale(task, qp, sums.unit_unit, sums.unit_target)
    return _fit_scale_and_zero(task, qp, qp.zero, sums)


@dataclass(frozen=True, slots=True)
class Sums:
    """Of products over each block, float32 [NB, KB], times the columns' weights.

    target: the weight itself. unit: what it was rounded to, in units of its scale, the zero point taken off.
    """

    unit_unit: Tensor
    unit_target: Tensor
    unit: Tensor
    ones: Tensor
    target: Tensor


def _sums_of_rows(task: ScaleTask, qp: QParams, rounded: Tensor | None, rows: slice) -> Tensor:
    """float32 [5, NB, KB]: what Sums holds, of a slice of rows."""
    fmt, part = task.fmt, task.work[rows]
    sub = tile(fmt, qp, task.shape, rows, slice(0, task.shape[1]))
    block = fmt.block((part.shape[0], part.shape[1]))
    scale = sub.effective()[:, None, :, None]
    near = fmt.round(part, sub) if rounded is None else rounded[rows]
    target, value = block_view(part, block), block_view(near, block)
    if sub.zero is not None:
        value = value - sub.zero[:, None, :, None]
    unit = torch.where(scale == 0, torch.zeros_like(value), value / scale)
    weight = torch.ones_like(part[0]) if task.weights is None else task.weights
    weight = weight.view(1, 1, -1, block[1])
    products = (unit * unit, unit * target, unit, torch.ones_like(unit), target)
    return torch.stack([(weight * product).sum(dim=(1, 3)) for product in products])


def _fit_scale(task: ScaleTask, qp: QParams, unit_unit: Tensor, unit_target: Tensor) -> QParams:
    """Least squares of target = scale * unit. Blocks that determine no scale keep theirs."""
    scale, effective = unit_target / unit_unit, qp.effective()
    return task.fmt.qparams(torch.where((unit_unit > 0) & (scale * effective > 0), scale, effective), like=qp)


def _fit_scale_and_zero(task: ScaleTask, qp: QParams, zero: Tensor, sums: Sums) -> QParams:
    """Least squares of target = scale * unit + zero. Blocks that determine no scale keep theirs."""
    cc, cw, c, one, w = sums.unit_unit, sums.unit_target, sums.unit, sums.ones, sums.target
    det = cc * one - c * c
    scale, moved = (cw * one - c * w) / det, (cc * w - c * cw) / det
    good = (det > 1e-6 * cc * one) & (scale > 0)
    like = replace(qp, zero=torch.where(good, moved, zero))
    return task.fmt.qparams(torch.where(good, scale, qp.effective()), like=like)
