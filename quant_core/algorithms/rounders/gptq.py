"""Error feedback: each column's rounding error is made up for by the columns after it, as the inputs' Hessian says.

Then sweeps of coordinate descent over the finished solution, with a least-squares re-fit of the scales between them.
Sources: GPTQ, arXiv 2210.17323; LDLQ, arXiv 2307.13304.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...cancel import poll
from ...formats.base import Format
from ...formats.slices import group_columns
from ...numerics.precision import tensor_core_products
from ...numerics.scales import QParams
from ..factor import Factor, column_order, damped, factor
from ..options import setting
from ..task import Begun, Rounded, Task
from .base import Rounder
from .feedback import feedback_pass
from .group_scales import feedback_pass_with_scales, group_order, has_groups
from .refit import refit_scales, worth_refitting

_DAMPING_STEPS = (1.0, 10.0, 100.0, 1000.0)  # tried in turn when the factorisation fails
_SCARCE = 0.05  # damping grows to this many times K / rows: what few rows say of correlations is partly chance


@dataclass(frozen=True, slots=True)
class Gptq(Rounder):
    """damping: share of the Hessian's diagonal added to it, more where the rows are few.

    order: which columns are rounded first. group_scales: "static" chooses all scales beforehand, "updated" while the
    columns advance (group_scales.py). sweeps: coordinate descents afterwards. A third and a fourth were measured to
    give at most 0.2 dB more. refits: how many of them start with a re-fit of the scales, where the format has fine
    scales for rows (refit.py says why).
    """

    name: ClassVar[str] = "gptq"
    explain: ClassVar[str] = (
        "corrects later columns for earlier errors: slower, much closer with a calibration, and nearest without one."
    )
    weight_copies: ClassVar[float] = 6.0
    damping: float = setting(0.01, low=1e-6, high=10.0)
    order: str = setting("activation", choices=("activation", "natural"))
    group_scales: str = setting("static", choices=("static", "updated"))
    sweeps: int = setting(2, low=0, high=1000)
    refits: int = setting(1, low=0, high=1000)

    def begin(self, task: Task) -> Begun:
        """Factors the Hessian, and has the scales chosen by what feedback leaves of each column's error.

        What is left is the factor's pivot D_k, not the channel's mean square H_kk: errors that later columns undo do
        not count. Pivots that span many orders of magnitude alone let scales clip what no later column can undo
        (measured: 2.8 times the error of nearest on one layer in blocks of 128 x 128). So the geometric mean of D_k
        and H_kk decides.
        """
        objective = task.objective
        if objective.hessian is None or objective.diagonal is None:
            why = "gptq: nothing is known of this layer's inputs, rounded to nearest"
            return Begun(objective.diagonal, objective, lambda qp: _nearest(task, qp, why))
        found = self._factor(task, objective.hessian, objective.diagonal)
        if found is None:
            most = self.damping * _DAMPING_STEPS[-1]
            why = f"gptq: the Hessian is not definite even with damping {most:g}, rounded to nearest"
            return Begun(objective.diagonal, objective, lambda qp: _nearest(task, qp, why))
        weights = torch.empty_like(found.pivots)
        weights[found.order] = (found.pivots * objective.diagonal[found.order]).sqrt_()
        return Begun(weights, objective, Feedback(self, task, objective.hessian, found, weights).finish)

    def updates(self, fmt: Format) -> bool:
        """Whether scales are chosen while the columns advance."""
        return self.group_scales == "updated" and has_groups(fmt)

    def damping_for(self, task: Task) -> float:
        rows = task.objective.rows
        return max(self.damping, _SCARCE * task.shape[1] / rows) if rows else self.damping

    def _factor(self, task: Task, hessian: Tensor, diagonal: Tensor) -> Factor | None:
        if self.updates(task.fmt) and self.order == "activation":
            order = group_order(diagonal, group_columns(task.fmt, task.shape))
        else:
            order = column_order(diagonal, self.order)
        for step in _DAMPING_STEPS:
            found = factor(hessian, order, self.damping_for(task) * step, poll)
            if found is not None:
                return found
        return None


def _nearest(task: Task, qp: QParams, why: str) -> Rounded:
    """Without a factor the inputs are taken as uncorrelated. That is round-to-nearest, and the note says so."""
    return Rounded(task.encode(task.work, qp), qp, (why,))


@dataclass(frozen=True, slots=True)
class Feedback:
    """A layer whose Hessian is factored. weights: as in ScaleTask, for scales chosen on the way."""

    how: Gptq
    task: Task
    hessian: Tensor
    found: Factor
    weights: Tensor

    def finish(self, qp: QParams) -> Rounded:
        """Uses up the factor."""
        task, used, wanted = self.task, self.found.damping, self.how.damping_for(self.task)
        with tensor_core_products(task.work.device):
            work, qp = self._feed_back(qp)
        raised = f"gptq: damping raised from {wanted:g} to {used:g}, the Hessian is not definite below"
        return Rounded(task.encode(work, qp), qp, (raised,) if used > wanted else ())

    def _feed_back(self, qp: QParams) -> tuple[Tensor, QParams]:
        """The rounded work weight and its scales."""
        task, found, how = self.task, self.found, self.how
        errors = torch.zeros_like(task.work)
        if how.updates(task.fmt):
            qp = feedback_pass_with_scales(task, qp, errors, found.order, found.columns, self.weights)
        else:
            feedback_pass(task, qp, errors, found.order, found.columns)
        found.panels.clear()
        descent = Descent(self.hessian, found.order, found.damping)
        for sweep in range(how.sweeps):
            if sweep < how.refits and worth_refitting(task.fmt):
                errors = _in_channel_order(errors, descent.order)
                qp = refit_scales(task, self.hessian, qp, errors, descent.added)
                errors = errors[:, descent.order]
            feedback_pass(task, qp, errors, descent.order, descent.columns)
        return _in_channel_order(errors, descent.order).neg_().add_(task.work), qp


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
