"""Error feedback: the factor, the column pass, its kernel, and what they promise about the objective."""

from dataclasses import replace

import pytest
import torch
from comfyui_quantpress.quant_core.algorithms.choosers import Search
from comfyui_quantpress.quant_core.algorithms.factor import PANEL, column_order, factor
from comfyui_quantpress.quant_core.algorithms.objective import Objective
from comfyui_quantpress.quant_core.algorithms.rounders import Gptq, feedback
from comfyui_quantpress.quant_core.algorithms.rounders.group_scales import group_order, has_groups
from comfyui_quantpress.quant_core.algorithms.task import ScaleTask, Task
from comfyui_quantpress.quant_core.formats import all_formats, get_format
from comfyui_quantpress.quant_core.formats.records import ColumnGrid


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hessian(k, seed=0, rows=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows or 3 * k, k, generator=generator) @ (
        torch.eye(k) + 0.3 * torch.randn(k, k, generator=generator)
    )
    return x.T @ x / len(x)


def task(fmt, w, h):
    work = fmt.prepare(w)
    h = fmt.prepare_hessian(h.clone())
    return Task(fmt, work, Objective(h, h.diagonal()), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [1, 7, PANEL, PANEL + 1, 2 * PANEL + 90])
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_factor_gives_the_hessian_back(k, order):
    h = hessian(k)
    columns = column_order(h.diagonal(), order)
    found = factor(h, columns, 0.01, lambda: None)
    unit = torch.eye(k)
    for start in range(0, k, PANEL):
        stop = min(start + PANEL, k)
        unit[:stop, start:stop] += found.columns(start, stop)
    wanted = (h + 0.01 * h.diagonal().diag())[columns][:, columns]
    assert torch.allclose(unit * found.pivots @ unit.T, wanted, rtol=2e-4, atol=2e-4 * float(wanted.abs().max()))


def test_factor_refuses_what_is_not_definite():
    assert factor(-torch.eye(20), torch.arange(20), 0.01, lambda: None) is None


def test_damping_is_raised_until_the_factor_exists_and_the_note_says_so():
    fmt = get_format("int8_rowwise")
    h = hessian(40)
    h -= 0.1 * h.diagonal().mean() * torch.eye(40)  # what rounding in a merged file might do, much larger
    w = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    result = Gptq().begin(task(fmt, w, h)).finish(fmt.absmax(w))
    assert any("damping raised" in note for note in result.notes)


def test_uncorrelated_inputs_give_round_to_nearest():
    fmt = get_format("nvfp4")
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    given = task(fmt, w, torch.eye(64))
    qp = fmt.absmax(given.work)
    result = Gptq(refits=0).begin(given).finish(qp)
    assert torch.equal(fmt.decode(result.codes, qp), fmt.round(given.work, qp))


@pytest.mark.parametrize(
    "fmt", [replace(f, rotation=16 if f.rotation else None) for f in all_formats()], ids=lambda f: f.name
)
def test_every_sweep_and_every_refit_lowers_the_objective(fmt):
    w = torch.randn(128, 256, generator=torch.Generator().manual_seed(1)) * 0.1
    losses = []
    for rounder in (Gptq(sweeps=0), Gptq(sweeps=1, refits=0), Gptq(sweeps=3, refits=0), Gptq(sweeps=3, refits=3)):
        given = task(fmt, w, hessian(256))
        result = rounder.begin(given).finish(fmt.absmax(given.work))
        losses.append(given.objective.loss(given.work - fmt.decode(result.codes, result.qp)))
    assert losses[1] <= losses[0] * 1.0001 and losses[2] <= losses[1] * 1.0001 and losses[3] <= losses[2] * 1.01


@pytest.mark.parametrize("fmt", all_formats(), ids=lambda f: f.name)
def test_column_grid_rounds_as_the_format_does(fmt):
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    work = fmt.prepare(w)
    qp = fmt.absmax(work)
    order = torch.randperm(work.shape[1], generator=torch.Generator().manual_seed(2))[:40]
    grid = fmt.column_grid(qp, order, tuple(work.shape))
    want = fmt.round(work, qp)[:, order]
    for i in range(len(order)):
        levels = grid.levels if grid.levels.dim() == 1 else grid.levels[:, i]
        got = feedback.nearest(
            work[:, order[i]], levels, grid.scale[:, i], None if grid.zero is None else grid.zero[:, i]
        )
        far = (got - want[:, i]).abs() > 1e-5 * grid.scale[:, i]
        tie = ((work[:, order[i]] - got).abs() - (work[:, order[i]] - want[:, i]).abs()).abs() < 1e-5 * grid.scale[
            :, i
        ]
        assert (~far | tie).all()


@pytest.mark.parametrize("kind", ["shared", "per_weight", "zero"])
@pytest.mark.parametrize("shape", [(20, 24), (3, 1)])
def test_kernel_agrees_with_the_torch_pass(kind, shape):
    pytest.importorskip("triton", reason="triton is not installed")
    from comfyui_quantpress.quant_core.algorithms.rounders.feedback_triton import round_block_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator).to(device)

    original, old = draw(*shape), 0.1 * draw(*shape)
    target = original + 0.1 * draw(*shape)
    inner = (0.2 * draw(shape[1], shape[1])).fill_diagonal_(0)
    levels = draw(13).sort().values if kind != "per_weight" else draw(*shape, 16).sort(dim=-1).values
    grid = ColumnGrid(levels, draw(*shape).abs(), draw(*shape) if kind == "zero" else None)
    outcomes = []
    for run in (feedback.round_block_torch, round_block_triton):
        errors = old.clone()
        run(original, target.clone(), errors, inner, grid)
        outcomes.append(errors)
    agree = (outcomes[0] - outcomes[1]).abs() <= 1e-4 * outcomes[0].abs() + 1e-5
    assert agree[:, 0].all() and agree.float().mean() > 0.97  # one turned weight changes those after it in its row


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize(
    "fmt",
    [replace(f, rotation=16 if f.rotation else None) for f in all_formats() if has_groups(f)],
    ids=lambda f: f.name,
)
def test_scales_updated_on_the_way_round_to_themselves_and_beat_nearest(fmt, order):
    w = torch.randn(128, 256, generator=torch.Generator().manual_seed(1)) * 0.1
    given = task(fmt, w, hessian(256))
    start = fmt.absmax(given.work)
    result = Gptq(group_scales="updated", order=order).begin(given).finish(start)

    def loss(codes, qp):
        return given.objective.loss(fmt.decode(codes, qp) - given.work)

    assert loss(result.codes, result.qp) < 0.7 * loss(fmt.encode(given.work, start), start)


def test_updated_scales_pay_on_groups_of_16():
    fmt = get_format("nvfp4")
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * 0.1
    losses = {}
    for choice in ("static", "updated"):
        given = task(fmt, w, hessian(256))
        begun = Gptq(group_scales=choice).begin(given)
        result = begun.finish(Search().choose(ScaleTask(fmt, given.work, begun.weights)))
        losses[choice] = given.objective.loss(fmt.decode(result.codes, result.qp) - given.work)
    assert losses["updated"] < losses["static"]


def test_group_order_keeps_groups_whole_and_puts_strong_ones_first():
    assert group_order(torch.tensor([1.0, 2.0, 9.0, 8.0, 3.0, 3.0]), 2).tolist() == [2, 3, 4, 5, 1, 0]
