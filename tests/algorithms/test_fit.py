"""Learned rounding: the loop, its objectives, schedules and stop rules."""

import math
import weakref

import pytest
import torch
from comfyui_quantpress.quant_core.algorithms.evidence import Evidence
from comfyui_quantpress.quant_core.algorithms.fit import neighbours
from comfyui_quantpress.quant_core.algorithms.fit.loop import FitSettings, fit
from comfyui_quantpress.quant_core.algorithms.fit.neighbours import Choice, Neighbours, pack_bits, unpack_bits
from comfyui_quantpress.quant_core.algorithms.fit.objectives import (
    Output,
    ProjectionSettings,
    leading_directions,
    projected,
)
from comfyui_quantpress.quant_core.algorithms.fit.optimizers import OPTIMIZERS
from comfyui_quantpress.quant_core.algorithms.fit.relaxations import RELAXATIONS
from comfyui_quantpress.quant_core.algorithms.fit.schedules import SCHEDULES, ScheduleSettings, StopRule, make_schedule
from comfyui_quantpress.quant_core.algorithms.objective import Objective
from comfyui_quantpress.quant_core.algorithms.task import Task
from comfyui_quantpress.quant_core.cancel import cancel_scope, poll
from comfyui_quantpress.quant_core.errors import Cancelled
from comfyui_quantpress.quant_core.formats import all_formats, get_format, slices
from comfyui_quantpress.quant_core.pipeline import layer
from comfyui_quantpress.quant_core.pipeline.layer import quantize_layer
from comfyui_quantpress.quant_core.policy.recipe import parse_recipe
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def weight(n=256, k=256, seed=0):
    """Decaying singular values, as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(n, 32, generator=generator), torch.randn(32, k, generator=generator)
    return 0.02 * (left * torch.linspace(2, 0.1, 32)) @ right + 0.05 * torch.randn(n, k, generator=generator)


def task(fmt, w):
    return Task(fmt, fmt.prepare(w), Objective(), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [fmt.name for fmt in all_formats()])
def test_learning_lowers_the_projected_error_and_hardly_touches_the_weight_error(name):
    w, fmt = weight(), get_format(name)
    result = quantize_layer("layer", w, parse_recipe(fmt, "absmax", "learned", options={"iterations": 150}))
    nearest = quantize_layer("layer", w, parse_recipe(fmt, "absmax", "nearest"))
    assert result.judgement.objective == "projected" and not result.judgement.fell_back
    assert result.judgement.error < 0.95 * result.judgement.nearest_error
    assert result.weight_error <= 1.0501 * nearest.weight_error


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_combination_runs_and_returns_grid_points_no_worse_than_the_start(
    optimizer, relaxation, schedule, monkeypatch
):
    monkeypatch.setattr(neighbours, "FEWEST", 64 * 96 // 3)
    fmt = get_format("int8_rowwise")
    given = task(fmt, weight(64, 96))
    grid = Neighbours(fmt, given.work, fmt.absmax(given.work))
    objective = projected(given, ProjectionSettings())
    result = fit(
        grid, RELAXATIONS[relaxation](0.3), objective, FitSettings(40, optimizer, schedule, 0.01), lambda: None
    )
    start = objective.total_loss([fmt.round(given.work, grid.qp) - given.work])
    assert result.start_loss == pytest.approx(start, rel=1e-5)
    assert result.choice is not None
    rounded = grid.rounded(result.choice)
    assert objective.total_loss([rounded - given.work]) == pytest.approx(result.loss * start, rel=1e-4)
    assert result.loss < 1.0
    assert torch.equal(fmt.round(rounded, grid.qp), rounded)


@pytest.mark.parametrize("name", [fmt.name for fmt in all_formats()])
def test_a_choice_is_encoded_as_the_neighbours_it_names(name):
    fmt, w = get_format(name), weight()
    given = task(fmt, w)
    grid = Neighbours(fmt, given.work, fmt.absmax(given.work))
    slices = grid.slices(2)
    low, high = fmt.bracket_columns(given.work, grid.qp, 0, given.shape)
    up = torch.rand(given.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    choice = Choice(slices, [pack_bits(up[rows]) for rows in slices])
    assert torch.equal(grid.rounded(choice), torch.where(up, high, low))
    assert torch.allclose(fmt.decode(grid.encode(choice), grid.qp), torch.where(up, high, low), rtol=1e-5, atol=1e-7)
    assert torch.equal(grid.encode(None).view(torch.uint8), fmt.encode(given.work, grid.qp).view(torch.uint8))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 16)])
def test_bits_come_back_as_they_were(shape):
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(unpack_bits(pack_bits(flags), flags.numel()).view(shape), flags)


@pytest.mark.parametrize("objective", ["projected", "output"])
def test_slices_of_any_height_give_the_loss_and_the_gradient_of_the_whole(objective):
    w = weight(48, 32)
    target = (
        Output(w.T @ w)
        if objective == "output"
        else projected(task(get_format("int8_rowwise"), w), ProjectionSettings())
    )
    error = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    slices = [slice(0, 7), slice(7, 40), slice(40, 48)]
    assert target.total_loss(error[rows] for rows in slices) == pytest.approx(target.total_loss([error]), rel=1e-5)
    shares = sum(target.share(error[rows], rows) for rows in slices)
    parts = [target.gradient(error[rows].clone(), rows, shares) for rows in slices]
    assert torch.allclose(torch.cat(parts), target.gradient(error.clone(), slice(0, 48), shares), atol=1e-5)


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
    slope = (target.total_loss([error + step]) - target.total_loss([error - step])) / 2
    rows = slice(0, 24)
    gradient = target.gradient(error.clone(), rows, target.share(error, rows))
    assert slope == pytest.approx(float((gradient * step).sum()), rel=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "radam"])
def test_an_optimizer_on_slices_steps_as_torchs_own_on_the_whole(kind):
    """Within what the mean of the gradients loses as bfloat16."""
    generator = torch.Generator().manual_seed(0)
    sliced = torch.zeros(6, 8)
    whole = torch.nn.Parameter(torch.zeros(6, 8))
    theirs = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[kind]([whole], lr=0.01, weight_decay=0.0)
    ours = OPTIMIZERS[kind]()
    for _ in range(30):
        gradient = torch.randn(6, 8, generator=generator) + 0.5
        whole.grad = gradient.clone()
        theirs.step()
        for index, rows in enumerate((slice(0, 2), slice(2, 6))):
            ours.step(index, sliced[rows], gradient[rows].clone(), 0.01)
    assert float(whole.detach().abs().max()) > 0.05
    assert torch.allclose(sliced, whole.detach(), rtol=0.02, atol=1e-3)


def test_the_original_optimizer_measures_steps_by_the_gradient_of_the_whole_layer():
    variable, gradient = torch.zeros(6, 8), torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    gradient[:2] *= 0.1
    optimizer = OPTIMIZERS["original"]()
    for _ in range(2):
        before = variable.clone()
        for index, rows in enumerate((slice(0, 2), slice(2, 6))):
            optimizer.step(index, variable[rows], gradient[rows].clone(), 0.5)
    assert torch.allclose(variable - before, -0.5 * gradient / gradient.square().mean().sqrt(), rtol=1e-4)
    before = variable.clone()
    for index, rows in enumerate((slice(0, 2), slice(2, 6))):  # a jump: what the slices gave before counts no more
        optimizer.step(index, variable[rows], 1000 * gradient[rows], 0.5)
    assert torch.allclose(variable[2:] - before[2:], -0.5 * gradient[2:] / gradient.square().mean().sqrt(), rtol=1e-4)
    assert float((variable - before)[:2].square().mean().sqrt()) == pytest.approx(0.5, rel=1e-4)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that live, except those in `given`."""

    def __init__(self, *given):
        super().__init__()
        self.held = {t.untyped_storage()._cdata: None for t in given}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor.untyped_storage())
        return out

    def hold(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.held:
            return

        def gone(_):
            del self.held[key]
            self.now -= size

        self.held[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


# A layer of 3072 x 3072 is cut into 20 or 28 slices; so is this small one, and what judges it takes the share it takes
# there.
@pytest.mark.parametrize(
    "optimizer, relaxation, turns, objective, name",
    [
        ("original", "adaround", 2, "projected", "nvfp4"),
        ("original", "straight_through", 1, "output", "int8_rowwise"),
        ("adamw", "adaround", 1, "projected", "float8_e4m3fn_rowwise"),
        ("adamw", "straight_through", 1, "output", "mxfp8"),
        ("radam", "adaround", 1, "projected", "nvfp4"),
        ("radam", "straight_through", 1, "projected", "bnb_nf4"),
        ("radam", "adaround", 1, "output", "float8_e4m3fn"),
    ],
)
def test_learning_takes_at_most_three_copies_of_the_weight_beyond_weight_and_hessian(
    optimizer, relaxation, turns, objective, name, monkeypatch
):
    monkeypatch.setattr(neighbours, "FEWEST", 0)
    monkeypatch.setitem(slices._SLICE, "cpu", (1 << 20) * 2**21 // 3072**2)
    monkeypatch.setattr(layer, "JUDGED_AT_ONCE", (1 << 20) * 2**21 // 3072**2)
    w = weight(1024, 1024)
    hessian = w.T @ w
    evidence = Evidence(hessian=hessian, count=1024) if objective == "output" else Evidence()
    options = {"iterations": 2, "optimizer": optimizer, "relaxation": relaxation, "scale_refinement": turns}
    live = Live(w, hessian)
    with live:
        result = quantize_layer(
            "layer", w, parse_recipe(get_format(name), "absmax", "learned", options=options), evidence
        )
    assert result.judgement.objective == objective
    assert 1.0 < live.peak / (4 * w.numel()) <= 3.0


def test_learning_is_cancelled_between_two_slices(monkeypatch):
    monkeypatch.setattr(neighbours, "FEWEST", 0)
    fmt, asked = get_format("int8_rowwise"), []
    given = task(fmt, weight())
    grid, objective = Neighbours(fmt, given.work, fmt.absmax(given.work)), projected(given, ProjectionSettings())
    per_iteration = len(grid.slices(OPTIMIZERS["original"].parts))
    fit(grid, RELAXATIONS["adaround"](0.3), objective, FitSettings(1), lambda: asked.append(1))
    assert per_iteration >= 10 and len(asked) == 3 * per_iteration  # the start takes two passes
    with pytest.raises(Cancelled), cancel_scope(lambda: True):
        fit(grid, RELAXATIONS["adaround"](0.3), objective, FitSettings(1), poll)


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
    assert [
        rule.reason(0.05, 1.0, 0),
        rule.reason(1.0, 0.001, 0),
        rule.reason(1.0, 1.0, 6),
        rule.reason(1.0, 1.0, 5),
    ] == ["loss", "lr", "stall", None]


def test_scale_refinement_never_ends_above_one_round():
    w, fmt = weight(128, 128), get_format("nvfp4")
    one, three = (
        quantize_layer(
            "l", w, parse_recipe(fmt, "absmax", "learned", options={"iterations": 60, "scale_refinement": rounds})
        )
        for rounds in (1, 3)
    )
    assert three.judgement.error <= one.judgement.error * 1.0001


def test_the_outputs_objective_without_inputs_is_told():
    result = quantize_layer(
        "l",
        weight(),
        parse_recipe(get_format("nvfp4"), "absmax", "learned", options={"learn_objective": "output", "iterations": 5}),
    )
    assert (
        any("nothing is known of this layer's inputs" in note for note in result.notes)
        and result.judgement.objective == "projected"
    )
    plain = quantize_layer(
        "l", weight(), parse_recipe(get_format("nvfp4"), "absmax", "learned", options={"iterations": 5})
    )
    assert not any("inputs" in note for note in plain.notes)
