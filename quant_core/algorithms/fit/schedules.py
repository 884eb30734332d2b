"""Learning-rate schedules. After each judged step a schedule is told the loss, and answers with the next rate."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """gamma: factor per step (exponential).

    patience: steps without improvement before a cut. factor: the cut. cooldown: steps after a cut that do not count.
    floor: the smallest rate. shape_influence: how much long, narrow layers slow it down (all plateau).
    threshold: what counts as an improvement, relative to the best loss ("rel") or absolute ("abs").
    adaptive_mode: an improvement makes "simple-reset" forget how long the loss did not fall; "no-reset" remembers.
    """

    gamma: float = 0.99
    patience: int = 8
    factor: float = 0.8
    cooldown: int = 0
    floor: float = 1e-8
    threshold: float = 0.0
    threshold_mode: str = "rel"
    adaptive_mode: str = "simple-reset"
    shape_influence: float = 1.0


# (steps up to which the tier holds, factor of the rate per step), for steps in a row that improved / did not.
_Tiers = tuple[tuple[float, float], ...]
IMPROVING: _Tiers = ((50, 1.05), (100, 1.04), (200, 1.03), (400, 1.02), (math.inf, 1.01))
WORSENING: _Tiers = ((10, 0.99), (50, 0.97), (100, 0.95), (math.inf, 0.9))


class Schedule:
    """Base: the rate never changes. `rate` is the current one."""

    def __init__(self, rate: float, settings: ScheduleSettings) -> None:
        self.rate, self.settings = rate, settings
        self.best, self.worse = math.inf, 0

    def improved(self, loss: float) -> bool:
        """Whether `loss` beats the best so far by the threshold; remembers it and counts the steps that did not."""
        margin = self.settings.threshold * (abs(self.best) if self.settings.threshold_mode == "rel" else 1.0)
        better = self.best == math.inf or loss < self.best - margin
        self.worse = 0 if better else self.worse + 1
        self.best = min(self.best, loss)
        return better

    def step(self, loss: float) -> float:
        self.improved(loss)
        return self.rate


class Exponential(Schedule):
    def step(self, loss: float) -> float:
        self.improved(loss)
        self.rate *= self.settings.gamma
        return self.rate


class Plateau(Schedule):
    """Cuts the rate after `patience` steps without improvement.

    aspect: longer side / shorter side of the layer. Patience grows with its root, and the cut shrinks alike: a 4:1
    layer has twice the patience, and two of its cuts make one of a square layer's.
    """

    def __init__(self, rate: float, settings: ScheduleSettings, aspect: float) -> None:
        super().__init__(rate, settings)
        stretch = 1.0 + settings.shape_influence * (math.sqrt(aspect) - 1.0)
        self.patience = int(settings.patience * stretch)
        self.factor = settings.factor ** (1.0 / stretch)
        self.rest = 0

    def step(self, loss: float) -> float:
        better = self.improved(loss)
        if self.rest > 0:
            self.rest, self.worse = self.rest - 1, 0
        elif not better and self.worse > self.patience:
            self.rate = max(self.settings.floor, self.rate * self.factor)
            self.rest, self.worse = self.settings.cooldown, 0
        return self.rate


class Adaptive(Schedule):
    """Raises the rate while the loss falls and lowers it while it does not, in tiers of how long that has lasted."""

    def __init__(self, rate: float, settings: ScheduleSettings) -> None:
        super().__init__(rate, settings)
        self.ceiling = 10.0 * rate
        self.rising = self.falling = 0

    def step(self, loss: float) -> float:
        if self.improved(loss):
            self.rising += 1
            if self.settings.adaptive_mode == "simple-reset":
                self.falling = 0
            tiers, count = IMPROVING, self.rising
        else:
            self.falling, self.rising = self.falling + 1, 0
            tiers, count = WORSENING, self.falling
        self.rate *= next(factor for limit, factor in tiers if count <= limit)
        self.rate = min(self.ceiling, max(self.settings.floor, self.rate))
        return self.rate


SCHEDULES = ("adaptive", "exponential", "plateau", "constant")


def make_schedule(name: str, rate: float, settings: ScheduleSettings, shape: tuple[int, int]) -> Schedule:
    """name: one of SCHEDULES."""
    if name == "plateau":
        return Plateau(rate, settings, max(shape) / min(shape))
    return {"adaptive": Adaptive, "exponential": Exponential, "constant": Schedule}[name](rate, settings)


@dataclass(frozen=True, slots=True)
class StopRule:
    """Stops when the judged loss (relative to round-to-nearest's) or the rate falls below a bound.

    stall: stops as well when nothing improved for so many judged steps.
    """

    loss: float = 5e-9
    rate: float = 1.01e-8
    stall: int = 50

    def reason(self, loss: float, rate: float, stalled: int) -> str | None:
        if loss <= self.loss:
            return "loss"
        if rate <= self.rate:
            return "lr"
        return "stall" if stalled > self.stall else None
