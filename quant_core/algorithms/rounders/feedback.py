"""One pass over the columns in which every column is rounded knowing the errors of the others.

The same pass serves GPTQ (feedback from the columns before, errors 0 at the start) and coordinate descent (feedback
from all columns, errors of the solution so far). Both round column k to the grid point nearest to
    w_k + sum_j error_j F_jk,       error = w - rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...cancel import poll
from ...formats.records import ColumnGrid
from ...numerics.scales import QParams
from ...numerics.triton_kernels import runs_triton
from ..task import Task

BLOCK = 128  # columns whose feedback from outside is one matrix product


def feedback_pass(
    task: Task, qp: QParams, errors: Tensor, order: Tensor, feedback: Callable[[int, int], Tensor], block: int = BLOCK
) -> None:
    """errors: float32 [Np, Kp], columns in `order`, changed in place.

    feedback(start, stop): float32 [R, stop - start], rows for the first R columns of `order`, R >= stop. 0 where a
    column would feed itself.
    """
    k = order.numel()
    for start in range(0, k, block):
        poll()
        stop = min(start + block, k)
        columns = order[start:stop]
        weights = feedback(start, stop)
        original = task.work[:, columns]
        target = torch.addmm(original, errors[:, : weights.shape[0]], weights)
        grid = task.fmt.column_grid(qp, columns, task.shape)
        round_block(original, target, errors[:, start:stop], weights[start:stop], grid)


def round_block(original: Tensor, target: Tensor, errors: Tensor, inner: Tensor, grid: ColumnGrid) -> None:
    """Columns one after the other. original, target, errors: [N, C]; inner: [C, C], zero diagonal.

    target already holds the feedback of `errors` as they came in; errors is written in place, target is used up.
    """
    if runs_triton(original.device):
        from .feedback_triton import round_block_triton

        round_block_triton(original, target, errors, inner, grid)
    else:
        round_block_torch(original, target, errors, inner, grid)


def round_block_torch(original: Tensor, target: Tensor, errors: Tensor, inner: Tensor, grid: ColumnGrid) -> None:
    """The specification of round_block. Columns lie contiguous in the transposes, which a CPU likes."""
    goal, source, old = target.T.contiguous(), original.T.contiguous(), errors.T.contiguous()
    scale = grid.scale.T.contiguous()
    zero = None if grid.zero is None else grid.zero.T.contiguous()
    for i in range(goal.shape[0]):
        levels = grid.levels if grid.levels.dim() == 1 else grid.levels[:, i]
        rounded = nearest(goal[i], levels, scale[i], None if zero is None else zero[i])
        new = source[i] - rounded
        goal[i + 1 :].addr_(inner[i, i + 1 :], new - old[i])
        old[i] = new
    errors.copy_(old.T)


def nearest(x: Tensor, levels: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """x, scale, zero: [N]; levels: [L] or [N, L], ascending -> nearest of zero + scale * levels. A tie goes down."""
    units = (x if zero is None else x - zero) / torch.where(scale == 0, torch.ones_like(scale), scale)
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    if levels.dim() == 1:
        chosen = levels[torch.bucketize(units, middles)]
    else:
        index = torch.searchsorted(middles.contiguous(), units[:, None].contiguous())
        chosen = torch.gather(levels, 1, index).squeeze(1)
    return chosen * scale if zero is None else torch.addcmul(zero, chosen, scale)
