"""Learned rounding: gradient descent over which of its two grid neighbours each weight becomes.

It lowers the error along the weight's leading singular directions, or the output error where inputs are known. It costs
hundreds of passes; where there is data, gptq ends lower in a fraction of the time. Memory: beyond the work weight and the
Hessian at most three copies of the weight, one and a half to two with the `original` optimizer; more in layers of a few
million weights, whose slices are not made smaller, and with full_matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...numerics.scales import QParams
from ..choosers.search import least_squares
from ..fit.loop import FitSettings, fit
from ..fit.neighbours import Neighbours
from ..fit.objectives import Output, ProjectionSettings, projected
from ..fit.optimizers import OPTIMIZERS
from ..fit.relaxations import RELAXATIONS
from ..fit.schedules import SCHEDULES, ScheduleSettings, StopRule
from ..options import read_options
from ..task import Rounded, Task

_NO_INPUTS = (
    "learned: nothing is known of this layer's inputs, so the projected objective was used instead of the output's"
)


def _choice(default: str, choices) -> str:
    return field(default=default, metadata={"choices": tuple(choices)})


def _number(default, low=None, high=None):
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, slots=True)
class LearnedOptions:
    """learn_objective: "auto" is "output" with a Hessian, else "projected". The rest: fit/loop.py, fit/schedules.py,
    fit/objectives.py under the same names. scale_refinement: fits in a row, the scales re-fitted between them.
    """

    learn_objective: str = _choice("auto", ("auto", "projected", "output"))
    relaxation: str = _choice("adaround", RELAXATIONS)
    optimizer: str = _choice("original", OPTIMIZERS)
    iterations: int = _number(400, 1)
    lr: float = _number(0.05, 1e-12)
    lr_schedule: str = _choice("adaptive", SCHEDULES)
    lr_gamma: float = _number(0.99, 0.0, 1.0)
    lr_patience: int = _number(8, 0)
    lr_factor: float = _number(0.8, 0.0, 1.0)
    lr_min: float = _number(1e-8, 0.0)
    lr_cooldown: int = _number(0, 0)
    lr_threshold: float = _number(0.0, 0.0)
    lr_threshold_mode: str = _choice("rel", ("rel", "abs"))
    lr_adaptive_mode: str = _choice("simple-reset", ("simple-reset", "no-reset"))
    lr_shape_influence: float = _number(1.0, 0.0, 1.0)
    early_stop_loss: float = _number(5e-9, 0.0)
    early_stop_lr: float = _number(1.01e-8, 0.0)
    early_stop_stall: int = _number(50, 1)
    top_p: float = _number(0.2, 0.0, 1.0)
    min_k: int = _number(16, 1)
    max_k: int = _number(1280, 1)
    full_matrix: bool = False
    ridge: float = _number(0.005, 0.0)
    pressure: float = _number(0.3, 0.0)
    max_weight_error: float = _number(1.05, 1.0)
    scale_refinement: int = _number(1, 1, 20)

    def fit_settings(self) -> FitSettings:
        schedule = ScheduleSettings(
            self.lr_gamma,
            self.lr_patience,
            self.lr_factor,
            self.lr_cooldown,
            self.lr_min,
            self.lr_threshold,
            self.lr_threshold_mode,
            self.lr_adaptive_mode,
            self.lr_shape_influence,
        )
        return FitSettings(
            self.iterations,
            self.optimizer,
            self.lr_schedule,
            self.lr,
            self.max_weight_error,
            schedule,
            StopRule(self.early_stop_loss, self.early_stop_lr, self.early_stop_stall),
        )


def prepare(task: Task) -> Task:
    """Settles the objective, under which the result is also compared with round-to-nearest."""
    options, hessian = read_options(LearnedOptions, task.options), task.objective.hessian
    if hessian is not None and options.learn_objective != "projected":
        return replace(task, aim=Output(hessian))
    return replace(
        task,
        aim=projected(
            task, ProjectionSettings(options.top_p, options.min_k, options.max_k, options.full_matrix, options.ridge)
        ),
    )


def round_codes(task: Task, qp: QParams) -> Rounded:
    """Starts from round-to-nearest under `qp` and returns it when nothing better was found. Takes a prepared task."""
    options = read_options(LearnedOptions, task.options)
    relaxation = RELAXATIONS[options.relaxation](options.pressure)
    best, best_choice, best_loss, grid = None, None, 0.0, Neighbours(task.fmt, task.work, qp)
    for turn in range(options.scale_refinement):
        if turn:
            rounded = None if best_choice is None else best.rounded(best_choice)
            grid = Neighbours(task.fmt, task.work, least_squares(replace(task, weights=None), best.qp, rounded))
            del rounded
        result = fit(grid, relaxation, task.aim, options.fit_settings(), task.poll)
        loss = result.loss * result.start_loss
        if best is None or loss < best_loss:
            best, best_choice, best_loss = grid, result.choice, loss
    unmet = options.learn_objective == "output" and task.aim.name != "output"
    return Rounded(best.encode(best_choice), best.qp, (_NO_INPUTS,) if unmet else ())
