"""Round up or down at random, so that every weight is right on average.

Its error is larger than that of rounding to nearest (by half, about), but it has no bias: use it where many rounded
copies are averaged. Weights beyond the grid's ends are clipped, and there it is biased like every rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...cancel import poll
from ...numerics.scales import QParams
from ..task import Begun, Rounded, Task
from .base import Rounder

_COLUMNS = 512


@dataclass(frozen=True, slots=True)
class Stochastic(Rounder):
    """P(up) = (w - lo) / (hi - lo)."""

    name: ClassVar[str] = "stochastic"
    explain: ClassVar[str] = "is unbiased noise: for merging, not for quality."
    weight_copies: ClassVar[float] = 7.0
    unbiased: ClassVar[bool] = True

    def begin(self, task: Task) -> Begun:
        return Begun(task.objective.diagonal, task.objective, lambda qp: _draw(task, qp))


def _draw(task: Task, qp: QParams) -> Rounded:
    """The random numbers are drawn on the CPU, so every device gets the same codes."""
    fmt, (n, k) = task.fmt, task.shape
    rounded = torch.empty_like(task.work)
    for start in range(0, k, _COLUMNS):
        poll()
        columns = task.work[:, start : start + _COLUMNS]
        low, high = fmt.bracket_columns(columns, qp, start, (n, k))
        draw = torch.rand(columns.shape, generator=task.generator).to(columns.device)
        rounded[:, start : start + _COLUMNS] = torch.where(draw * (high - low) < columns - low, high, low)
    return Rounded(task.encode(rounded, qp), qp)
