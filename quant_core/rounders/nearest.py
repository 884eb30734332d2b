"""Round to nearest under the stored scales."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..format import Format
from ..recipe import Evidence
from ..scales import QParams


def round_codes(fmt: Format, work: Tensor, qp: QParams, evidence: Evidence, options: dict[str, Any],
                generator: torch.Generator) -> tuple[Tensor, QParams]:
    """work: float32 [Np, Kp] -> codes [Np, Kp] and the same scales."""
    return fmt.encode(work, qp), qp
