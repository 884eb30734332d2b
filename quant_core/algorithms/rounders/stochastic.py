"""Round up or down at random, so that every weight is right on average.

Its error is larger than that of rounding to nearest (by half, about), but it has no bias: use it where many rounded
copies are averaged. Weights beyond the grid's ends are clipped, and there it is biased like every rounding.
"""

from __future__ import annotations

import torch

from ...formats.tiles import encode_rows
from ...numerics.scales import QParams
from ..task import Rounded, Task

_COLUMNS = 512


def round_codes(task: Task, qp: QParams) -> Rounded:
    """P(up) = (w - lo) / (hi - lo). The random numbers are drawn on the CPU, so every device gets the same codes."""
    fmt, (n, k) = task.fmt, task.shape
    rounded = torch.empty_like(task.work)
    for start in range(0, k, _COLUMNS):
        task.poll()
        columns = task.work[:, start : start + _COLUMNS]
        low, high = fmt.bracket_columns(columns, qp, start, (n, k))
        draw = torch.rand(columns.shape, generator=task.generator).to(columns.device)
        rounded[:, start : start + _COLUMNS] = torch.where(draw * (high - low) < columns - low, high, low)
    return Rounded(encode_rows(fmt, rounded, qp), qp)
