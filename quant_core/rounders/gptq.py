"""Error feedback: each column's rounding error is made up for by the columns after it, as the inputs' Hessian says.

Then sweeps of coordinate descent over the finished solution, with a least-squares re-fit of the scales between them.
Sources: GPTQ, arXiv 2210.17323; LDLQ, arXiv 2307.13304.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..options import read_options
from ..scales import QParams
from ..task import Rounded, Task
from .factor import Factor, column_order, factor
from .feedback import feedback_pass
from .refit import refit_scales

_DAMPING_STEPS = (1.0, 10.0, 100.0, 1000.0)      # tried in turn when the factorisation fails


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """damping: share of the Hessian's mean diagonal added to it. order: which columns are rounded first.

    sweeps: coordinate descents afterwards. refit: re-fit the scales between the sweeps.
    """

    damping: float = field(default=0.01, metadata={"low": 1e-6, "high": 10.0})
    order: str = field(default="activation", metadata={"choices": ("activation", "natural")})
    sweeps: int = field(default=4, metadata={"low": 0, "high": 1000})
    refit: bool = True


def round_codes(task: Task, qp: QParams) -> Rounded:
    """Without a Hessian the inputs are taken as uncorrelated: that is round-to-nearest, and the note says so."""
    options = read_options(GptqOptions, task.options)
    if task.objective.hessian is None:
        return Rounded(task.fmt.encode(task.work, qp), qp, ("gptq: no Hessian for this layer, rounded to nearest",))
    found, notes = _factor(task, options)
    if found is None:
        return Rounded(task.fmt.encode(task.work, qp), qp, notes)
    errors = torch.zeros_like(task.work)
    feedback_pass(task, qp, errors, found.order, found.columns)
    descent = Descent(task.objective.hessian, found.order, found.damping)
    del found
    for _ in range(options.sweeps):
        if options.refit:
            errors = _in_channel_order(errors, descent.order)
            qp = refit_scales(task, qp, errors, descent.added)
            errors = errors[:, descent.order]
        feedback_pass(task, qp, errors, descent.order, descent.columns)
    work = _in_channel_order(errors, descent.order).neg_().add_(task.work)
    return Rounded(task.fmt.encode(work, qp), qp, notes)


class Descent:
    """Feedback of coordinate descent: H_jk / H_kk, with the damping that the factorisation used."""

    def __init__(self, hessian: Tensor, order: Tensor, damping: float) -> None:
        self.hessian, self.order = hessian, order
        self.added = damping * hessian.diagonal().mean()

    def columns(self, start: int, stop: int) -> Tensor:
        block = self.hessian[self.order[:, None], self.order[None, start:stop]]
        own = block[start:stop].diagonal()
        own += self.added
        block /= own.clone()
        own.zero_()
        return block


def _factor(task: Task, options: GptqOptions) -> tuple[Factor | None, tuple[str, ...]]:
    order = column_order(task.objective.diagonal, options.order)
    for step in _DAMPING_STEPS:
        found = factor(task.objective.hessian, order, options.damping * step, task.poll)
        if found is not None:
            return found, () if step == 1.0 else (f"gptq: damping raised from {options.damping:g} to {found.damping:g}",)
    return None, ("gptq: the Hessian is not positive even with damping "
                  f"{options.damping * _DAMPING_STEPS[-1]:g}, rounded to nearest",)


def _in_channel_order(errors: Tensor, order: Tensor) -> Tensor:
    result = torch.empty_like(errors)
    result[:, order] = errors
    return result
