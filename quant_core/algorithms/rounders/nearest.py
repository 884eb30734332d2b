"""Round to nearest under the stored scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..task import Begun, Rounded, Task
from .base import Rounder


@dataclass(frozen=True, slots=True)
class Nearest(Rounder):
    """Each weight on its own."""

    name: ClassVar[str] = "nearest"
    explain: ClassVar[str] = "is fast."
    weight_copies: ClassVar[float] = 6.0

    def begin(self, task: Task) -> Begun:
        objective = task.objective
        return Begun(objective.diagonal, objective, lambda qp: Rounded(task.encode(task.work, qp), qp))
