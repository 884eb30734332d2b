"""Learned rounding: gradient descent over which of its two grid neighbours each weight becomes.

It lowers the error along the weight's leading singular directions, or the output error where inputs are known. It
costs hundreds of passes. Where there is data, gptq ends lower in a fraction of the time.

Memory, beyond the work weight and the Hessian: at most three copies of the weight, one and a half to two with the
`original` optimizer. More with full_matrix, and in layers of a few million weights, whose slices are not made smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...cancel import poll
from ...numerics.scales import QParams
from ..choosers.search import least_squares
from ..fit.loop import FitSettings, fit
from ..fit.neighbours import Neighbours
from ..fit.objectives import Output, Projected, ProjectionSettings, projected
from ..fit.optimizers import OPTIMIZERS
from ..fit.relaxations import RELAXATIONS
from ..fit.schedules import SCHEDULES, ScheduleSettings, StopRule
from ..options import setting
from ..task import Begun, Rounded, ScaleTask, Task
from .base import Rounder

_NO_INPUTS = (
    "learned: nothing is known of this layer's inputs, so the projected objective was used instead of the output's"
)


@dataclass(frozen=True, slots=True)
class Learned(Rounder):
    """learn_objective: "auto" is "output" with a Hessian, else "projected". max_weight_error: FitSettings.heavier.

    scale_refinement: fits in a row, the scales re-fitted between them. `_fit_settings` and `_projection` say which
    settings of fit/ the others are.
    """

    name: ClassVar[str] = "learned"
    explain: ClassVar[str] = "optimises every layer's rounding: slowest, and hardly closer."
    weight_copies: ClassVar[float] = 6.0
    learn_objective: str = setting("auto", choices=("auto", "projected", "output"))
    relaxation: str = setting("adaround", choices=RELAXATIONS)
    optimizer: str = setting("original", choices=OPTIMIZERS)
    iterations: int = setting(400, low=1)
    lr: float = setting(0.05, low=1e-12)
    lr_schedule: str = setting("adaptive", choices=SCHEDULES)
    lr_gamma: float = setting(0.99, low=0.0, high=1.0)
    lr_patience: int = setting(8, low=0)
    lr_factor: float = setting(0.8, low=0.0, high=1.0)
    lr_min: float = setting(1e-8, low=0.0)
    lr_cooldown: int = setting(0, low=0)
    lr_threshold: float = setting(0.0, low=0.0)
    lr_threshold_mode: str = setting("rel", choices=("rel", "abs"))
    lr_adaptive_mode: str = setting("simple-reset", choices=("simple-reset", "no-reset"))
    lr_shape_influence: float = setting(1.0, low=0.0, high=1.0)
    early_stop_loss: float = setting(5e-9, low=0.0)
    early_stop_lr: float = setting(1.01e-8, low=0.0)
    early_stop_stall: int = setting(50, low=1)
    top_p: float = setting(0.2, low=0.0, high=1.0)
    min_k: int = setting(16, low=1)
    max_k: int = setting(1280, low=1)
    full_matrix: bool = False
    ridge: float = setting(0.005, low=0.0)
    pressure: float = setting(0.3, low=0.0)
    max_weight_error: float = setting(1.05, low=1.0)
    scale_refinement: int = setting(1, low=1, high=20)

    def begin(self, task: Task) -> Begun:
        """Settles the objective, under which the result is also compared with round-to-nearest."""
        hessian = task.objective.hessian
        if hessian is not None and self.learn_objective != "projected":
            target: Output | Projected = Output(hessian)
        else:
            target = projected(task, self._projection())
        return Begun(task.objective.diagonal, target, lambda qp: self._learn(task, target, qp))

    def _learn(self, task: Task, target: Output | Projected, qp: QParams) -> Rounded:
        """Starts from round-to-nearest under `qp` and returns it when nothing better was found."""
        relaxation, settings = RELAXATIONS[self.relaxation](self.pressure), self._fit_settings()
        grid = Neighbours(task.fmt, task.work, qp)
        result = fit(grid, relaxation, target, settings, poll)
        best, best_choice, best_loss = grid, result.choice, result.loss * result.start_loss
        for _ in range(1, self.scale_refinement):
            rounded = None if best_choice is None else best.rounded(best_choice)
            refitted = least_squares(ScaleTask(task.fmt, task.work), best.qp, rounded)
            del rounded
            grid = Neighbours(task.fmt, task.work, refitted)
            result = fit(grid, relaxation, target, settings, poll)
            loss = result.loss * result.start_loss
            if loss < best_loss:
                best, best_choice, best_loss = grid, result.choice, loss
        unmet = self.learn_objective == "output" and target.name != "output"
        return Rounded(best.encode(best_choice), best.qp, (_NO_INPUTS,) if unmet else ())

    def _projection(self) -> ProjectionSettings:
        return ProjectionSettings(self.top_p, self.min_k, self.max_k, self.full_matrix, self.ridge)

    def _fit_settings(self) -> FitSettings:
        return FitSettings(
            iterations=self.iterations,
            optimizer=self.optimizer,
            schedule=self.lr_schedule,
            rate=self.lr,
            heavier=self.max_weight_error,
            schedule_settings=ScheduleSettings(
                gamma=self.lr_gamma,
                patience=self.lr_patience,
                factor=self.lr_factor,
                cooldown=self.lr_cooldown,
                floor=self.lr_min,
                threshold=self.lr_threshold,
                threshold_mode=self.lr_threshold_mode,
                adaptive_mode=self.lr_adaptive_mode,
                shape_influence=self.lr_shape_influence,
            ),
            stop=StopRule(self.early_stop_loss, self.early_stop_lr, self.early_stop_stall),
        )
