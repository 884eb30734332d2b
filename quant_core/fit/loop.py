"""The one optimisation loop of learned rounding. Judged, kept and stopped by the hardened result only."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .optimizers import OPTIMIZERS
from .schedules import ScheduleSettings, StopRule, make_schedule


@dataclass(frozen=True, slots=True)
class FitSettings:
    """iterations: at most. rate: the first learning rate. heavier: how much larger than round-to-nearest's the plain
    weight error may be for a result to be kept (1.05: five per cent)."""

    iterations: int = 400
    optimizer: str = "original"
    schedule: str = "adaptive"
    rate: float = 0.05
    heavier: float = 1.05
    schedule_settings: ScheduleSettings = field(default_factory=ScheduleSettings)
    stop: StopRule = field(default_factory=StopRule)


@dataclass(frozen=True, slots=True)
class FitResult:
    """rounded: float32 [Np, Kp], on the grid. loss: of it, relative to `start`'s. iterations: done. stopped_by: "loss",
    "lr", "stall" or "iterations"."""

    rounded: Tensor
    loss: float
    iterations: int
    stopped_by: str


def fit(work: Tensor, start: Tensor, relaxation: Any, objective: Any, settings: FitSettings,
        poll: Callable[[], None]) -> FitResult:
    """work: float32 [Np, Kp]. start: what is returned unless something better is found, on the grid."""
    error = start - work
    first, allowed = objective.loss(error), float(error.square().sum(dtype=torch.float64)) * settings.heavier**2
    best, best_loss, stalled, stopped = start, 1.0, 0, "iterations"
    if first == 0.0:
        return FitResult(start, 0.0, 0, "loss")
    unit = float((objective.gradient(error) * relaxation.gap).square().mean().sqrt()) or 1.0
    optimizer = OPTIMIZERS[settings.optimizer](relaxation.variable, settings.rate)
    schedule = make_schedule(settings.schedule, settings.rate, settings.schedule_settings, tuple(work.shape))
    done = 0
    for done in range(1, settings.iterations + 1):
        poll()
        gradient = objective.gradient(relaxation.soft().sub_(work))
        optimizer.step(relaxation.gradient(gradient, unit, done / settings.iterations), schedule.rate)
        if done % relaxation.judged_every and done < settings.iterations:
            continue
        hard = relaxation.hard()
        error = hard - work
        loss = objective.loss(error) / first
        schedule.step(loss)
        fits = float(error.square().sum(dtype=torch.float64)) <= allowed
        stalled += 1
        if loss < best_loss and fits:
            best, best_loss, stalled = hard, loss, 0
        stopped_by = settings.stop.reason(best_loss, schedule.rate, stalled)
        if stopped_by is not None:
            stopped = stopped_by
            break
    return FitResult(best, best_loss, done, stopped)
