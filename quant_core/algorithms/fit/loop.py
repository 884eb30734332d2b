"""The one optimisation loop of learned rounding. Judged, kept and stopped by the hardened result only.

Every iteration goes through the layer in slices of rows. What is kept of a weight is the relaxation's variable, the
optimizer's memory and one bit. All else lives as long as its slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .neighbours import Choice, Neighbours, pack_bits
from .objectives import Target
from .optimizers import OPTIMIZERS, Optimizer
from .relaxations import Relaxation, harden
from .schedules import ScheduleSettings, StopRule, make_schedule


@dataclass(frozen=True, slots=True)
class FitSettings:
    """iterations: at most. rate: the first learning rate.

    heavier: a result is kept only if its plain weight error is at most this many times that of round-to-nearest.
    """

    iterations: int = 400
    optimizer: str = "original"
    schedule: str = "adaptive"
    rate: float = 0.05
    heavier: float = 1.05
    schedule_settings: ScheduleSettings = field(default_factory=ScheduleSettings)
    stop: StopRule = field(default_factory=StopRule)


@dataclass(frozen=True, slots=True)
class FitResult:
    """choice: None when nothing better than round-to-nearest was found. iterations: how many were done.

    start_loss: that of round-to-nearest. loss: that of the choice, relative to it.
    stopped_by: "loss", "lr", "stall" or "iterations".
    """

    choice: Choice | None
    start_loss: float
    loss: float
    iterations: int
    stopped_by: str


def fit(
    grid: Neighbours, relaxation: Relaxation, objective: Target, settings: FitSettings, poll: Callable[[], None]
) -> FitResult:
    """Starts from round-to-nearest on `grid`."""
    state = _State(grid, relaxation, objective, OPTIMIZERS[settings.optimizer](), poll)
    first, squared = state.begin()
    if first == 0.0:
        return FitResult(None, first, 0.0, 0, "loss")
    schedule = make_schedule(settings.schedule, settings.rate, settings.schedule_settings, grid.shape)
    choice, best_loss, allowed, stalled, stopped, done = None, 1.0, squared * settings.heavier**2, 0, "iterations", 0
    for done in range(1, settings.iterations + 1):
        judged = done % relaxation.judged_every == 0 or done == settings.iterations
        hard = state.step(schedule.rate, done / settings.iterations, judged)
        if not judged:
            continue
        loss, fits = objective.value(hard.total) / first, float(hard.squared) <= allowed
        schedule.step(loss)
        stalled += 1
        if loss < best_loss and fits:
            choice, best_loss, stalled = state.choice(), loss, 0
        stopped_by = settings.stop.reason(best_loss, schedule.rate, stalled)
        if stopped_by is not None:
            stopped = stopped_by
            break
    return FitResult(choice, first, best_loss, done, stopped)


class _Sums:
    """Of an error, over the slices so far: the objective's shares, and the plain squares in float64."""

    def __init__(self, objective: Target) -> None:
        self.objective = objective
        self.shares: Tensor | None = None
        self.squared: Tensor | float = 0.0

    def add(self, error: Tensor, rows: slice) -> None:
        self.squared = error.square().sum(dtype=torch.float64) + self.squared
        share = self.objective.share(error, rows)
        self.shares = share if self.shares is None else self.shares.add_(share)

    @property
    def total(self) -> Tensor:
        """The shares of all slices together."""
        if self.shares is None:
            raise ValueError("no slice was added")
        return self.shares


class _State:
    """What is kept between iterations: the variable, and what the objective needs to know of its present value."""

    def __init__(
        self,
        grid: Neighbours,
        relaxation: Relaxation,
        objective: Target,
        optimizer: Optimizer,
        poll: Callable[[], None],
    ) -> None:
        self.grid, self.poll = grid, poll
        self.relaxation, self.objective, self.optimizer = relaxation, objective, optimizer
        self.slices = grid.slices(optimizer.parts)
        self.variable = torch.empty(grid.work.shape, dtype=optimizer.stored, device=grid.work.device)
        self.soft = _Sums(objective)  # of the relaxed result, where one slice's gradient depends on the others
        self.unit = 1.0  # a typical gradient

    def begin(self) -> tuple[float, float]:
        """Puts the variable at its start. Round-to-nearest's loss and squared error."""
        nearest, soft = _Sums(self.objective), _Sums(self.objective)
        for rows in self.slices:
            self.poll()
            low, high = self.grid.bracket(rows)
            self.variable[rows] = self.relaxation.start(self.grid.work[rows], low, high)
            if self.objective.coupled:
                soft.add(self._error(self.variable[rows].float(), low, high, rows), rows)
            del low, high
            nearest.add(self.grid.nearest_error(rows), rows)
        self.soft = soft
        first = self.objective.value(nearest.total)
        if first > 0:
            self.unit = self._typical_gradient(nearest.total)
        return first, float(nearest.squared)

    def _typical_gradient(self, shares: Tensor) -> float:
        """Root mean square of the gradient at round-to-nearest, for the step from one neighbour to the other."""
        total = torch.zeros((), dtype=torch.float64, device=shares.device)
        for rows in self.slices:
            self.poll()
            gradient = self.objective.gradient(self.grid.nearest_error(rows), rows, shares)
            low, high = self.grid.bracket(rows)
            total += gradient.mul_(high.sub_(low)).square_().sum(dtype=torch.float64)
        return float(total.div_(self.variable.numel()).sqrt_()) or 1.0

    def step(self, rate: float, progress: float, judged: bool) -> _Sums:
        """One iteration; the sums of the hardened result where `judged`, else empty ones."""
        soft, hard = _Sums(self.objective), _Sums(self.objective)
        for index, rows in enumerate(self.slices):
            self.poll()
            self._step(index, rows, rate, progress, soft, hard if judged else None)
        # A relaxation that is judged in every iteration is hard already: both results are the same.
        self.soft = hard if self.relaxation.judged_every == 1 else soft
        return hard

    def _step(self, index: int, rows: slice, rate: float, progress: float, soft: _Sums, hard: _Sums | None) -> None:
        """One slice's part of an iteration. On its own, so that nothing of a slice outlives it."""
        low, high = self.grid.bracket(rows)
        variable = self._moved(index, rows, low, high, rate, progress)
        if hard is not None:
            hard.add(harden(variable, low, high).sub_(self.grid.work[rows]), rows)
        if self.objective.coupled and self.relaxation.judged_every > 1:
            soft.add(self._error(variable, low, high, rows), rows)

    def _moved(self, index: int, rows: slice, low: Tensor, high: Tensor, rate: float, progress: float) -> Tensor:
        """A slice's variable after the step, float32, as it is stored."""
        variable = self.variable[rows].float()  # a view where float32 is stored
        gradient = self.objective.gradient(self._error(variable, low, high, rows), rows, self.soft.shares)
        gradient.mul_(high - low).div_(self.unit)
        exact = variable.dtype == self.variable.dtype
        self.optimizer.step(index, variable, self.relaxation.gradient(variable, gradient, progress, exact), rate)
        if exact:
            return variable
        self.variable[rows] = variable
        return variable.copy_(self.variable[rows])

    def _error(self, variable: Tensor, low: Tensor, high: Tensor, rows: slice) -> Tensor:
        return self.relaxation.soft(variable, low, high).sub_(self.grid.work[rows])

    def choice(self) -> Choice:
        """The hardened result."""
        return Choice(self.slices, [pack_bits(self.variable[rows] > 0) for rows in self.slices])
