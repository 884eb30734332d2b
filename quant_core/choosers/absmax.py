"""The block's largest magnitude lands on the element's largest value."""
from __future__ import annotations

from typing import Any

from torch import Tensor

from ..format import Format
from ..recipe import Evidence
from ..scales import QParams


def choose(fmt: Format, work: Tensor, evidence: Evidence, options: dict[str, Any]) -> QParams:
    """work: float32 [Np, Kp]."""
    return fmt.absmax(work)
