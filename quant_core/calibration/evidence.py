"""Statistics -> Evidence: what the choosers and rounders see."""

from __future__ import annotations

import torch

from ..algorithms.evidence import Evidence
from .statistics.layer import LayerStatistics


def to_evidence(
    statistics: LayerStatistics, device: torch.device | str | None = None, hessian: bool = True
) -> Evidence:
    """Everything divided by the rows' weight, float32, on `device` (default: where the statistics are).

    hessian: False leaves the complete one out. The diagonal is exact also where the Hessian is a sketch. Waits for
    the GPU. Evidence without any sampled row has only the absmax, if there is one.
    """
    device = statistics.device if device is None else torch.device(device)
    absmax = statistics.absmax.to(device) if statistics.seen else None
    count = int(statistics.count)
    if count == 0:
        return Evidence(absmax=absmax)
    total = statistics.hessian_sum() if hessian else None
    full = None if total is None else total.to(device) / float(statistics.weight)
    rows = statistics.reservoir.filled().to(device)
    return Evidence(
        hessian=full,
        hessian_diagonal=statistics.mean_square().to(device),
        mean=statistics.mean().to(device),
        absmax=absmax,
        rows=rows if len(rows) else None,
        count=count,
    )
