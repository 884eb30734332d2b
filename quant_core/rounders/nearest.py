"""Round to nearest under the stored scales."""
from __future__ import annotations

from ..scales import QParams
from ..task import Rounded, Task


def round_codes(task: Task, qp: QParams) -> Rounded:
    """Each weight on its own."""
    return Rounded(task.fmt.encode(task.work, qp), qp)
