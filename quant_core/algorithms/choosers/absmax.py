"""The block's largest magnitude lands on the element's largest value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...numerics.scales import QParams
from ..task import ScaleTask
from .base import Chooser


@dataclass(frozen=True, slots=True)
class Absmax(Chooser):
    """No search: the format's own default scales."""

    name: ClassVar[str] = "absmax"
    explain: ClassVar[str] = "is fastest and never clips."

    def choose(self, task: ScaleTask) -> QParams:
        return task.fmt.absmax(task.work)
