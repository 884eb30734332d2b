"""`auto`: the chooser and the rounder that suit what is known of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ..numerics.scales import QParams
from .choosers.base import Chooser
from .choosers.search import Search
from .evidence import Evidence
from .rounders.base import Rounder
from .rounders.gptq import Gptq
from .rounders.nearest import Nearest
from .task import Begun, ScaleTask, Task

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class AutoScales(Chooser):
    """Scales are searched."""

    name: ClassVar[str] = AUTO
    explain: ClassVar[str] = "searches."
    search: Search = Search()

    def resolve(self, evidence: Evidence) -> Chooser:
        return self.search

    def choose(self, task: ScaleTask) -> QParams:
        return self.search.choose(task)

    def options(self) -> Iterator[tuple[str, Any, Any]]:
        return self.search.options()


@dataclass(frozen=True, slots=True)
class AutoRounding(Rounder):
    """gptq where there is a Hessian, nearest without."""

    name: ClassVar[str] = AUTO
    explain: ClassVar[str] = "is gptq with a calibration and nearest without."
    gptq: Gptq = Gptq()

    def resolve(self, evidence: Evidence) -> Rounder:
        return Nearest() if evidence.hessian is None else self.gptq

    def begin(self, task: Task) -> Begun:
        return (Nearest() if task.objective.hessian is None else self.gptq).begin(task)

    def options(self) -> Iterator[tuple[str, Any, Any]]:
        return self.gptq.options()
