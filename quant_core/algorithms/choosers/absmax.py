"""The block's largest magnitude lands on the element's largest value."""

from __future__ import annotations

from ...numerics.scales import QParams
from ..task import Task


def choose(task: Task) -> QParams:
    """No search: the format's own default scales."""
    return task.fmt.absmax(task.work)
