"""How codes are chosen. A rounder takes a Task and QParams, and returns Rounded (it may move the scales on)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...numerics.scales import QParams
from ..task import Rounded, Task
from . import gptq, learned, nearest, stochastic


def _as_it_is(task: Task) -> Task:
    return task


@dataclass(frozen=True, slots=True)
class Rounder:
    """prepare: runs before the scales are chosen, and may say what they should weigh.

    unbiased: it serves another aim than the smallest error, and is not compared with round-to-nearest.
    """

    round_codes: Callable[[Task, QParams], Rounded]
    prepare: Callable[[Task], Task] = _as_it_is
    unbiased: bool = False


ROUNDERS = {
    "nearest": Rounder(nearest.round_codes),
    "stochastic": Rounder(stochastic.round_codes, unbiased=True),
    "gptq": Rounder(gptq.round_codes, gptq.prepare),
    "learned": Rounder(learned.round_codes, learned.prepare),
}
ROUNDER_OPTIONS = (gptq.GptqOptions, learned.LearnedOptions)
