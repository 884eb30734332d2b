"""The three promises of every format x chooser x rounder, over the full product, and the corner cases of layers."""

import time
from dataclasses import replace

import pytest
import torch
from comfyui_quantpress.quant_core.algorithms.choosers import CHOOSERS
from comfyui_quantpress.quant_core.algorithms.evidence import Evidence
from comfyui_quantpress.quant_core.algorithms.objective import make_objective
from comfyui_quantpress.quant_core.algorithms.rounders import ROUNDERS
from comfyui_quantpress.quant_core.algorithms.task import Task, layer_generator
from comfyui_quantpress.quant_core.cancel import cancel_scope
from comfyui_quantpress.quant_core.errors import Cancelled
from comfyui_quantpress.quant_core.formats import all_formats, format_of_layer
from comfyui_quantpress.quant_core.numerics.metrics import relative_error
from comfyui_quantpress.quant_core.pipeline.layer import quantize_layer
from comfyui_quantpress.quant_core.policy.recipe import parse_recipe

FORMATS = [
    replace(
        fmt,
        group_size=min(fmt.group_sizes) if fmt.group_sizes else fmt.group_size,
        rotation=16 if fmt.rotation else None,
    )
    for fmt in all_formats()
]
QUICK = {"iterations": 12}  # learned rounding is judged like the others however short it is


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Layers this small are slower on several threads, and far slower when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weight(n=64, k=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * 0.05
    w[3] *= 6
    w[:, 5] *= 4
    return w


def inputs(k=64, rows=384, seed=1):
    """Correlated, with strong channels. The seed chooses the rows, not how the channels mix."""
    mixing = torch.randn(k // 4, k, generator=torch.Generator().manual_seed(0)) / 4
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k // 4, generator=generator) @ mixing + 0.3 * torch.randn(rows, k, generator=generator)
    x[:, :3] *= 12
    return x


def evidence(x):
    return Evidence(hessian=x.T @ x / len(x), mean=x.mean(0), count=len(x))


def decoded(fmt, result, shape):
    """As a reader does it: from the tensors and the JSON alone."""
    found = format_of_layer("layer", result.config, {name: tuple(t.shape) for name, t in result.tensors.items()})
    return found.dequantize(result.tensors, shape)


def own_objective(fmt, work, known, rounding):
    objective = make_objective(fmt, known, work.device)
    task = Task(fmt, work, objective, layer_generator(0, "layer"))
    return parse_recipe(fmt, rounding=rounding, options=QUICK).rounding.begin(task).judge


def product():
    for fmt in FORMATS:
        for scales in CHOOSERS:
            for rounding in ROUNDERS:
                yield pytest.param(fmt, scales, rounding, id=f"{fmt.name}-{scales}-{rounding}")


@pytest.mark.parametrize(("fmt", "scales", "rounding"), list(product()))
@pytest.mark.parametrize("data", [False, True], ids=["no_data", "hessian"])
def test_result_is_stored_judged_hardened_and_no_worse_than_nearest(fmt, scales, rounding, data):
    w = weight()
    known = evidence(inputs()) if data else Evidence()
    result = quantize_layer("layer", w, parse_recipe(fmt, scales, rounding, options=QUICK), known)
    got = decoded(fmt, result, tuple(w.shape))
    # 1 and 2: what the report says of the weight is what a reader decodes from the stored codes AND scales.
    assert result.weight_error == pytest.approx(relative_error(w, got), rel=1e-4)
    work = fmt.prepare(got)
    qp = fmt.unpack(result.tensors, tuple(w.shape))[1]
    assert relative_error(work, fmt.round(work, qp)) < 2e-6
    # 3: never worse than round-to-nearest under the objective.
    base = fmt.prepare(w)
    objective = own_objective(fmt, base, known, rounding)
    mine = objective.total_loss([work - base])
    nearest = objective.total_loss([fmt.round(base, fmt.absmax(base)) - base])
    if ROUNDERS[rounding].unbiased:
        lo, hi = fmt.bracket_columns(base, qp, 0, tuple(base.shape))
        assert (
            ((work - lo).abs() <= 1e-6 + 1e-5 * base.abs())
            .logical_or((work - hi).abs() <= 1e-6 + 1e-5 * base.abs())
            .all()
        )
    else:
        assert mine <= nearest * (1 + 1e-5)
        assert result.judgement.fell_back == any("taken instead" in note for note in result.notes)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_gptq_lowers_the_output_error_and_more_so_than_scales_alone(fmt):
    w, x, held_out = weight(), inputs(), inputs(seed=9)

    def error(scales, rounding):
        result = quantize_layer("l", w, parse_recipe(fmt, scales, rounding), evidence(x))
        return relative_error(w @ held_out.T, decoded(fmt, result, tuple(w.shape)) @ held_out.T)

    assert error("search", "gptq") < 0.75 * error("absmax", "nearest")


@pytest.mark.parametrize("rounding", ROUNDERS)
@pytest.mark.parametrize("scales", CHOOSERS)
def test_same_seed_gives_the_same_bytes(scales, rounding):
    fmt = next(f for f in FORMATS if f.name == "nvfp4")
    runs = [
        quantize_layer(
            "layer", weight(), parse_recipe(fmt, scales, rounding, seed=3, options=QUICK), evidence(inputs())
        )
        for _ in range(2)
    ]
    for name, tensor in runs[0].tensors.items():
        again = runs[1].tensors[name]
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), again.reshape(-1).view(torch.uint8))


def cases():
    x = inputs()
    dead = x.clone()
    dead[:, 10:50] = 0
    yield "dead_inputs", weight(), evidence(dead)
    yield "all_inputs_dead", weight(), evidence(torch.zeros_like(x))
    yield "rank_deficient", weight(), evidence(x[:9])
    yield "one_row_seen", weight(), evidence(x[:1])
    yield "zero_weight", torch.zeros(64, 64), evidence(x)
    yield "zero_block", torch.cat([torch.zeros(64, 32), weight()[:, 32:]], 1), evidence(x)
    yield "tiny_values", weight() * 1e-20, evidence(x)
    yield "strong_inputs", weight(), evidence(x * 1e8)


@pytest.mark.parametrize("rounding", [r for r in ROUNDERS if not ROUNDERS[r].unbiased])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_corner_cases_stay_finite_and_no_worse(fmt, rounding):
    for name, w, known in cases():
        result = quantize_layer("layer", w, parse_recipe(fmt, "search", rounding, options=QUICK), known)
        got = decoded(fmt, result, tuple(w.shape))
        assert torch.isfinite(got).all(), name
        assert result.judgement.error <= result.judgement.nearest_error, name


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 1), (3, 5)])
@pytest.mark.parametrize("rounding", ROUNDERS)
def test_odd_shapes(shape, rounding):
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(shape, generator=generator), torch.randn(40, shape[1], generator=generator)
    taken = [fmt for fmt in FORMATS if fmt.misfit(shape) is None]
    assert len(taken) >= 4
    for fmt in taken:
        result = quantize_layer("layer", w, parse_recipe(fmt, "search", rounding, options=QUICK), evidence(x))
        assert decoded(fmt, result, shape).shape == shape


@pytest.mark.parametrize("rounding", ROUNDERS)
def test_cancel_stops_within_a_second_in_the_middle_of_a_layer(rounding):
    fmt, pressed = FORMATS[0], []
    w = weight(512, 4096)
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    known = evidence(x)

    def cancel():
        pressed.append(time.monotonic())
        return True

    began = time.monotonic()
    with pytest.raises(Cancelled), cancel_scope(cancel):
        quantize_layer("layer", w, parse_recipe(fmt, "search", rounding), known)
    assert len(pressed) == 1 and time.monotonic() - pressed[0] < 1.0 and pressed[0] - began < 1.0
