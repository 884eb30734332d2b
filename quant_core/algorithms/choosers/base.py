"""What a chooser of scales is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ...numerics.scales import QParams
from ..evidence import Evidence
from ..options import Settings
from ..task import ScaleTask


@dataclass(frozen=True, slots=True)
class Chooser(Settings, ABC):
    """Its fields are its settings.

    name: in recipes, files and reports. explain: for users, a sentence or two that go on after the name.
    """

    name: ClassVar[str]
    explain: ClassVar[str]

    @abstractmethod
    def choose(self, task: ScaleTask) -> QParams:
        """Scales as a file holds them: rounded to what can be stored."""

    def resolve(self, evidence: Evidence) -> Chooser:
        """The chooser that runs for a layer of which this is known: itself, but for `auto`."""
        return self
