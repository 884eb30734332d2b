"""Learned rounding: the loop, its objectives, schedules and stop rules."""
import math

import pytest
import torch
from comfyui_quantpress.quant_core.fit.loop import FitSettings, fit
from comfyui_quantpress.quant_core.fit.objectives import Output, ProjectionSettings, leading_directions, projected
from comfyui_quantpress.quant_core.fit.optimizers import OPTIMIZERS
from comfyui_quantpress.quant_core.fit.relaxations import RELAXATIONS
from comfyui_quantpress.quant_core.fit.schedules import SCHEDULES, ScheduleSettings, StopRule, make_schedule
from comfyui_quantpress.quant_core.format import all_formats, get_format
from comfyui_quantpress.quant_core.layer import quantize_layer
from comfyui_quantpress.quant_core.objective import Objective
from comfyui_quantpress.quant_core.recipe import Recipe
from comfyui_quantpress.quant_core.task import Task


def weight(n=256, k=256, seed=0):
    """Decaying singular values, as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(n, 32, generator=generator), torch.randn(32, k, generator=generator)
    return 0.02 * (left * torch.linspace(2, 0.1, 32)) @ right + 0.05 * torch.randn(n, k, generator=generator)


def task(fmt, w):
    return Task("layer", fmt, fmt.prepare(w), Objective(), {}, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [fmt.name for fmt in all_formats()])
def test_learning_lowers_the_projected_error_and_hardly_touches_the_weight_error(name):
    w, fmt = weight(), get_format(name)
    result = quantize_layer("layer", w, Recipe(fmt, "absmax", "learned", options={"iterations": 150}))
    nearest = quantize_layer("layer", w, Recipe(fmt, "absmax", "nearest"))
    assert result.judgement.objective == "projected" and not result.judgement.fell_back
    assert result.judgement.error < 0.95 * result.judgement.nearest_error
    assert result.weight_error <= 1.0501 * nearest.weight_error


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_combination_runs_and_returns_grid_points_no_worse_than_the_start(optimizer, relaxation, schedule):
    fmt = get_format("int8_rowwise")
    given = task(fmt, weight(64, 96))
    qp = fmt.absmax(given.work)
    start = fmt.round(given.work, qp)
    objective = projected(given, ProjectionSettings())
    low, high = fmt.bracket_columns(given.work, qp, 0, given.shape)
    variable = RELAXATIONS[relaxation](given.work, low, high, 0.3)
    result = fit(given.work, start, variable, objective, FitSettings(40, optimizer, schedule, 0.01), lambda: None)
    assert objective.loss(result.rounded - given.work) <= objective.loss(start - given.work)
    assert torch.allclose(fmt.round(result.rounded, qp), result.rounded, atol=1e-7)


@pytest.mark.parametrize("objective", ["projected", "output"])
def test_gradients_are_those_of_the_losses(objective):
    w = weight(24, 32).double()
    if objective == "output":
        target = Output(w.T @ w)
    else:
        target = projected(task(get_format("int8_rowwise"), w.float()), ProjectionSettings(ridge=0.0))
        target = type(target)(target.left.double(), target.right.double(), 0.0)
    error = torch.randn(24, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = torch.randn(24, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 1e-4
    slope = (target.loss(error + step) - target.loss(error - step)) / 2
    assert slope == pytest.approx(float((target.gradient(error) * step).sum()), rel=1e-5)


def test_randomised_directions_span_what_the_exact_ones_span():
    w = weight()
    left, right = leading_directions(w, 16, torch.Generator().manual_seed(0))
    exact = torch.linalg.svd(w, full_matrices=False)
    assert float((left.T @ exact.U[:, :12]).norm() ** 2) > 0.97 * 12
    assert torch.allclose(right.T @ right, torch.eye(16), atol=1e-5)


def test_plateau_waits_longer_and_cuts_less_on_long_layers():
    settings = ScheduleSettings(patience=9, factor=0.92)
    square, long = (make_schedule("plateau", 1.0, settings, shape) for shape in ((3072, 3072), (12288, 3072)))
    assert (square.patience, long.patience) == (9, 18)
    assert long.factor == pytest.approx(math.sqrt(square.factor))
    off = make_schedule("plateau", 1.0, ScheduleSettings(patience=9, shape_influence=0.0), (12288, 3072))
    assert off.patience == 9


def test_plateau_cuts_after_its_patience_and_rests_for_its_cooldown():
    schedule = make_schedule("plateau", 1.0, ScheduleSettings(patience=2, factor=0.5, cooldown=3), (8, 8))
    rates = [schedule.step(loss) for loss in [1.0] + [2.0] * 10]
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_exponential_and_adaptive_move_the_rate():
    falling = make_schedule("exponential", 1.0, ScheduleSettings(gamma=0.5), (8, 8))
    assert [falling.step(1.0) for _ in range(3)] == [0.5, 0.25, 0.125]
    adaptive = make_schedule("adaptive", 1.0, ScheduleSettings(), (8, 8))
    risen = [adaptive.step(1.0 / (i + 1)) for i in range(5)][-1]
    fallen = [adaptive.step(10.0) for _ in range(60)][-1]
    assert risen > 1.0 > fallen


@pytest.mark.parametrize("mode", ["simple-reset", "no-reset"])
def test_adaptive_mode_decides_whether_an_improvement_forgets_the_bad_steps(mode):
    schedule = make_schedule("adaptive", 1.0, ScheduleSettings(adaptive_mode=mode), (8, 8))
    for loss in [1.0] + [2.0] * 30 + [0.5]:
        schedule.step(loss)
    before = schedule.rate
    assert schedule.step(2.0) / before == pytest.approx(0.99 if mode == "simple-reset" else 0.97)


def test_threshold_decides_what_counts_as_an_improvement():
    strict = make_schedule("constant", 1.0, ScheduleSettings(threshold=0.1), (8, 8))
    absolute = make_schedule("constant", 1.0, ScheduleSettings(threshold=0.1, threshold_mode="abs"), (8, 8))
    assert [strict.improved(loss) for loss in (10.0, 9.5, 8.0)] == [True, False, True]
    assert [absolute.improved(loss) for loss in (10.0, 9.5, 9.45)] == [True, True, False]


def test_stop_rule_names_its_reason():
    rule = StopRule(loss=0.1, rate=0.01, stall=5)
    assert [rule.reason(0.05, 1.0, 0), rule.reason(1.0, 0.001, 0), rule.reason(1.0, 1.0, 6), rule.reason(1.0, 1.0, 5)] == [
        "loss", "lr", "stall", None]


def test_scale_refinement_never_ends_above_one_round():
    w, fmt = weight(128, 128), get_format("nvfp4")
    one, three = (quantize_layer("l", w, Recipe(fmt, "absmax", "learned", options={"iterations": 60, "scale_refinement": rounds}))
                  for rounds in (1, 3))
    assert three.judgement.error <= one.judgement.error * 1.0001
