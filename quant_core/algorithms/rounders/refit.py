"""Least-squares scales for fixed codes under the Hessian, one group of columns after the other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...cancel import poll
from ...formats.base import Format
from ...formats.slices import block_row_slices, group_columns, tile
from ...numerics.scales import Granularity, QParams, block_view
from ..task import Task


def worth_refitting(fmt: Format) -> bool:
    """Whether a format has fine scales for rows: those gain 1 to 2 % of the error.

    Scales of groups gain 0.5 %, for up to half of the time on a GPU. Coarse stored scales snap back to where they
    were. One scale for many rows has nothing left to gain.
    """
    return fmt.granularity is Granularity.ROW and fmt.scale_dtype.searched is None


def refit_scales(task: Task, hessian: Tensor, qp: QParams, errors: Tensor, added: Tensor) -> QParams:
    """errors: float32 [Np, Kp] = work - rounded in channel order, changed in place to those of the new scales.

    hessian: float32 [Kp, Kp]. added: float32 [Kp], what is added to its diagonal. Each block's scale moves to the
    minimum of the quadratic objective, is snapped to what can be stored, and is kept only where the decoded result is
    better, so the objective never rises. The format is one that `worth_refitting` accepts.
    """
    fmt, shape = task.fmt, task.shape
    scale, zero = qp.scale.clone(), None if qp.zero is None else qp.zero.clone()
    result = replace(qp, scale=scale, zero=zero)
    width = group_columns(fmt, shape)
    for start in range(0, shape[1], width):
        cols = slice(start, start + width)
        part = task.work[:, cols]
        for rows in block_row_slices(fmt, part):
            poll()
            current = tile(fmt, result, shape, rows, cols)  # views into `scale`, `zero`
            new, keep = _refit_block(fmt, current, part[rows], errors[rows], cols, hessian, added)
            current.scale.copy_(torch.where(keep, new.scale, current.scale))
    return result


def _refit_block(
    fmt: Format, sub: QParams, original: Tensor, errors: Tensor, cols: slice, hessian: Tensor, added: Tensor
) -> tuple[QParams, Tensor]:
    """The new QParams of one group of columns and which blocks keep them, bool [NB, 1]; updates errors[:, cols]."""
    block = fmt.block((original.shape[0], original.shape[1]))
    own = errors[:, cols]
    rounded = (original - own).contiguous()
    codes = fmt.encode(rounded, sub)
    pull = torch.addmm(own * added[cols], errors, hessian[:, cols])  # E H of these columns
    within = hessian[cols, cols]

    def sums(a: Tensor, b: Tensor) -> Tensor:
        return block_view(a * b, block).sum(dim=(1, 3))

    effective = sub.effective()
    view = block_view(rounded, block)
    view = view if sub.zero is None else view - sub.zero[:, None, :, None]
    divisor = torch.where(effective == 0, torch.ones_like(effective), effective)
    unit = (view / divisor[:, None, :, None]).reshape(original.shape)
    numerator = sums(pull, unit)
    denominator = sums(torch.addmm(added[cols] * unit, unit, within), unit)
    wished = effective + torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))
    new = fmt.qparams(torch.where(wished * effective > 0, wished, effective), like=sub)

    change = fmt.decode(codes, new) - rounded
    gain = sums(torch.addmm(added[cols] * change, change, within).sub_(pull, alpha=2), change)
    keep = gain < 0
    own -= block_view(change, block).mul(keep[:, None, :, None]).view(original.shape)
    return new, keep
