"""What a rounder is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..evidence import Evidence
from ..options import Settings
from ..task import Begun, Task


@dataclass(frozen=True, slots=True)
class Rounder(Settings, ABC):
    """Chooses codes. Its fields are its settings.

    name: in recipes, files and reports. explain: for users, a sentence or two that go on after the name.
    weight_copies: float32 copies of the weight at the peak, the weight included; a layer that needs more than a GPU
    has is computed on the CPU. bench/rounding/synthetic.py measures them. The default is the most that any rounder
    took. unbiased: it serves another aim than the smallest error, so its result is not compared with round-to-nearest.
    """

    name: ClassVar[str]
    explain: ClassVar[str]
    weight_copies: ClassVar[float] = 7.0
    unbiased: ClassVar[bool] = False

    @abstractmethod
    def begin(self, task: Task) -> Begun:
        """What has to be settled before the scales are chosen; `Begun.finish` rounds."""

    def resolve(self, evidence: Evidence) -> Rounder:
        """The rounder that runs for a layer of which this is known: itself, but for `auto`."""
        return self
