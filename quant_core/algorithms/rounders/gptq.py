"""Error feedback: each column's rounding error is made up for by the columns after it, as the inputs' Hessian says.

Then sweeps of coordinate descent over the finished solution, with a least-squares re-fit of the scales between them.
Sources: GPTQ, arXiv 2210.17323; LDLQ, arXiv 2307.13304.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...formats.tiles import encode_rows, group_columns
from ...numerics.precision import tensor_core_products
from ...numerics.scales import QParams
from ..factor import Factor, column_order, damped, factor
from ..options import read_options
from ..task import Rounded, Task
from .feedback import feedback_pass
from .group_scales import feedback_pass_with_scales, group_order, has_groups
from .refit import refit_scales, worth_refitting

_DAMPING_STEPS = (1.0, 10.0, 100.0, 1000.0)  # tried in turn when the factorisation fails
_SCARCE = 0.05  # damping grows to this many times K / rows: what few rows say of correlations is partly chance


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """damping: share of the Hessian's diagonal added to it, more where the rows are few. order: which columns are rounded first.

    group_scales: "static" chooses all scales beforehand, "updated" while the columns advance (group_scales.py).
    sweeps: coordinate descents afterwards; a third and a fourth were measured to give at most 0.2 dB more. refits: how
    many of them start with a re-fit of the scales, where the format has fine scales for rows (refit.py says why).
    """

    damping: float = field(default=0.01, metadata={"low": 1e-6, "high": 10.0})
    order: str = field(default="activation", metadata={"choices": ("activation", "natural")})
    group_scales: str = field(default="static", metadata={"choices": ("static", "updated")})
    sweeps: int = field(default=2, metadata={"low": 0, "high": 1000})
    refits: int = field(default=1, metadata={"low": 0, "high": 1000})


def prepare(task: Task) -> Task:
    """Factors the Hessian, and has the scales chosen by what feedback leaves of each column's error.

    That is the factor's pivot D_k, not the channel's mean square H_kk: errors that later columns undo do not count. Where
    pivots span many orders they alone let scales clip what no later column can undo (measured: 2.8 times the error of
    nearest on one layer in blocks of 128 x 128), so their geometric mean with H_kk decides.
    """
    if task.objective.hessian is None:
        return task
    options = read_options(GptqOptions, task.options)
    if _updates(task, options) and options.order == "activation":
        order = group_order(task.objective.diagonal, group_columns(task.fmt, task.shape))
    else:
        order = column_order(task.objective.diagonal, options.order)
    for step in _DAMPING_STEPS:
        found = factor(task.objective.hessian, order, _damping(task, options) * step, task.poll)
        if found is not None:
            weights = torch.empty_like(found.pivots)
            weights[order] = (found.pivots * task.objective.diagonal[order]).sqrt_()
            return replace(task, factor=found, weights=weights)
    return task


def round_codes(task: Task, qp: QParams) -> Rounded:
    """Without a Hessian the inputs are taken as uncorrelated: that is round-to-nearest, and the note says so."""
    options, found = read_options(GptqOptions, task.options), task.factor
    if found is None:
        return Rounded(encode_rows(task.fmt, task.work, qp), qp, (_why_not(task, options),))
    with tensor_core_products(task.work.device):
        work, qp = _feed_back(task, qp, found, options)
    wanted = _damping(task, options)
    raised = f"gptq: damping raised from {wanted:g} to {found.damping:g}, the Hessian is not definite below"
    return Rounded(encode_rows(task.fmt, work, qp), qp, (raised,) if found.damping > wanted else ())


def _feed_back(task: Task, qp: QParams, found: Factor, options: GptqOptions) -> tuple[Tensor, QParams]:
    """The rounded work weight and its scales. Uses up the factor."""
    errors = torch.zeros_like(task.work)
    if _updates(task, options):
        qp = feedback_pass_with_scales(task, qp, errors, found.order, found.columns)
    else:
        feedback_pass(task, qp, errors, found.order, found.columns)
    found.panels.clear()
    descent = Descent(task.objective.hessian, found.order, found.damping)
    for sweep in range(options.sweeps):
        if sweep < options.refits and worth_refitting(task.fmt):
            errors = _in_channel_order(errors, descent.order)
            qp = refit_scales(task, qp, errors, descent.added)
            errors = errors[:, descent.order]
        feedback_pass(task, qp, errors, descent.order, descent.columns)
    return _in_channel_order(errors, descent.order).neg_().add_(task.work), qp


def _damping(task: Task, options: GptqOptions) -> float:
    rows = task.objective.rows
    return max(options.damping, _SCARCE * task.shape[1] / rows) if rows else options.damping


def _updates(task: Task, options: GptqOptions) -> bool:
    return options.group_scales == "updated" and has_groups(task.fmt)


def _why_not(task: Task, options: GptqOptions) -> str:
    if task.objective.hessian is None:
        return "gptq: nothing is known of this layer's inputs, rounded to nearest"
    return f"gptq: the Hessian is not definite even with damping {options.damping * _DAMPING_STEPS[-1]:g}, rounded to nearest"


class Descent:
    """Feedback of coordinate descent: H_jk / H_kk, with the damping that the factorisation used."""

    def __init__(self, hessian: Tensor, order: Tensor, damping: float) -> None:
        self.hessian, self.order = hessian, order
        self.added = damped(hessian.diagonal(), damping)

    def columns(self, start: int, stop: int) -> Tensor:
        block = self.hessian[self.order[:, None], self.order[None, start:stop]]
        own = block[start:stop].diagonal()
        own += self.added[self.order[start:stop]]
        block /= own.clone()
        own.zero_()
        return block


def _in_channel_order(errors: Tensor, order: Tensor) -> Tensor:
    result = torch.empty_like(errors)
    result[:, order] = errors
    return result
