"""Round to nearest under the stored scales."""

from __future__ import annotations

from ...formats.tiles import encode_rows
from ...numerics.scales import QParams
from ..task import Rounded, Task


def round_codes(task: Task, qp: QParams) -> Rounded:
    """Each weight on its own."""
    return Rounded(encode_rows(task.fmt, task.work, qp), qp)
