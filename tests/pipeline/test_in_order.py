"""Quantizing in order of execution: what layers are fitted to, calls side by side, and the whole way."""

import time
from collections import OrderedDict
from contextvars import ContextVar

import pytest
import torch
from comfyui_quantpress.quant_core.algorithms.asymmetric import RIDGES, InputPairs, follow
from comfyui_quantpress.quant_core.algorithms.evidence import Evidence
from comfyui_quantpress.quant_core.algorithms.objective import Objective
from comfyui_quantpress.quant_core.calibration.capture.budget import plan_budget
from comfyui_quantpress.quant_core.calibration.capture.collector import CaptureSettings, Collector
from comfyui_quantpress.quant_core.calibration.capture.linear_modules import linear_modules
from comfyui_quantpress.quant_core.calibration.storage import save_calibration
from comfyui_quantpress.quant_core.calibration.use import CalibrationUse
from comfyui_quantpress.quant_core.errors import Cancelled, RequestError
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.numerics.footprint import following_bytes
from comfyui_quantpress.quant_core.pipeline.in_order.jobs import LiveModel, enough_calls, room, spread
from comfyui_quantpress.quant_core.pipeline.in_order.lockstep import Lockstep, Visits, visits
from comfyui_quantpress.quant_core.pipeline.layer import quantize_layer
from comfyui_quantpress.quant_core.pipeline.request import Request
from comfyui_quantpress.quant_core.pipeline.run import convert
from comfyui_quantpress.quant_core.policy.recipe import Recipe, parse_recipe
from comfyui_quantpress.quant_core.tools.dequantize import dequantize
from safetensors.torch import load_file, save_file
from torch import nn

NVFP4 = get_format("nvfp4")
RECIPE = parse_recipe(NVFP4, "search", "gptq")


def nothing():
    pass


def pairs_of(calls, rows=40, k=24, off=0.3, seed=0, shrink=True):
    """Inputs of correlated channels; y is off by noise of a few directions, so that part of it can be told from y."""
    generator = torch.Generator().manual_seed(seed)
    mixing, wrong = (torch.randn(8, k, generator=torch.Generator().manual_seed(one)) for one in (50, 51))
    x = [torch.randn(rows, 8, generator=generator) @ mixing for _ in range(calls)]
    y = [one + off * torch.randn(rows, 8, generator=generator) @ wrong * shrink for one in x]
    return InputPairs(x, y)


def missing(w, weight, pairs):
    """|x W^T - y weight^T| over all rows."""
    return float((torch.cat(list(pairs.original)) @ w.T - torch.cat(list(pairs.delivered)) @ weight.T).norm())


def test_following_takes_back_error_of_the_inputs_on_calls_it_has_not_seen():
    w = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    found, fresh = follow(w, pairs_of(20), nothing), pairs_of(20, seed=9)
    assert found.ridge in RIDGES and found.left < 0.9
    assert missing(w, found.weight, fresh) < 0.9 * missing(w, w, fresh)
    assert abs(missing(w, found.weight, fresh) / missing(w, w, fresh) - found.left) < 0.1  # and says how much


def test_the_least_squares_weight_is_found_where_rows_abound():
    w = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    pairs = pairs_of(400, off=1.0)
    x, y = torch.cat(list(pairs.original)).double(), torch.cat(list(pairs.delivered)).double()
    ridge = RIDGES[0] * torch.eye(24).double() * (y.T @ y).trace() / 24
    best = w + torch.linalg.solve(y.T @ y + ridge, y.T @ (x - y) @ w.T.double()).T.float()
    assert torch.allclose(follow(w, pairs, nothing).weight, best, atol=1e-3)


@pytest.mark.parametrize(
    "pairs", [pairs_of(20, shrink=False), pairs_of(3), InputPairs([], [])], ids=["exact", "three calls", "none"]
)
def test_a_weight_stays_where_nothing_is_to_be_made_up_for(pairs):
    w = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    found = follow(w, pairs, nothing)
    assert found.ridge is None and found.left == 1.0 and found.weight is w


def test_chance_in_few_rows_is_not_fitted():
    """Noise that y tells nothing about: whatever a fit finds there is chance, and the calls kept aside say so."""
    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(4, 64, generator=generator) for _ in range(8)]
    pairs = InputPairs(x, [one + 1e-3 * torch.randn(4, 64, generator=generator) for one in x])
    w = torch.randn(16, 64, generator=generator)
    found = follow(w, pairs, nothing)
    assert found.ridge is None or found.ridge == max(RIDGES)


def test_calls_of_different_lengths_count_by_their_rows():
    long, short = pairs_of(8, rows=64), pairs_of(8, rows=5, seed=4)
    pairs = InputPairs([*long.original, *short.original], [*long.delivered, *short.delivered])
    w = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    assert follow(w, pairs, nothing).left < 1


def test_a_layer_too_large_for_the_gpu_is_followed_on_the_cpu_and_says_so(monkeypatch):
    from comfyui_quantpress.quant_core.pipeline import layer as layer_module

    w, pairs = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)), pairs_of(20)
    needed = following_bytes((16, 24))
    monkeypatch.setattr(layer_module, "free_bytes", lambda device: needed - 1)
    result = quantize_layer("l", w, Recipe(get_format("int8_rowwise")), pairs=pairs)
    assert result.notes[0].startswith("what makes up for the layers before was computed on the CPU: it needs about")
    assert result.judgement.inputs_left < 0.9


def test_calls_of_one_picture_do_not_judge_each_other():
    """Each of eight pictures has ten calls that are all but equal.

    Judged by calls, chance in a picture would look like the rule.
    """
    generator = torch.Generator().manual_seed(3)
    pictures = [torch.randn(6, 64, generator=generator) for _ in range(8)]
    off = [0.3 * torch.randn(6, 64, generator=generator) for _ in range(8)]
    groups = [call // 10 for call in range(80)]
    near = lambda x: x + 1e-3 * torch.randn(x.shape, generator=generator)  # noqa: E731
    pairs = [near(pictures[group]) for group in groups], [near(pictures[group] + off[group]) for group in groups]
    w = torch.randn(16, 64, generator=generator)
    alone, together = follow(w, InputPairs(*pairs), nothing), follow(w, InputPairs(*pairs, groups), nothing)
    assert alone.left < 0.5 < together.left
    x = torch.randn(400, 64, generator=generator)
    fresh = InputPairs([x], [x + 0.3 * torch.randn(400, 64, generator=generator)])
    assert missing(w, together.weight, fresh) < 1.05 * missing(w, w, fresh) < 0.8 * missing(w, alone.weight, fresh)


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "learned"])
@pytest.mark.parametrize("name", ["nvfp4", "int8_rowwise", "int8_convrot", "bnb_nf4"])
def test_every_rounder_rounds_towards_the_followed_weight(name, rounding):
    fmt = get_format(name, rotation=16) if name == "int8_convrot" else get_format(name)
    generator = torch.Generator().manual_seed(1)
    w, pairs = torch.randn(32, 64, generator=generator), pairs_of(24, k=64, off=1.0)
    x = torch.cat(list(pairs.original))
    evidence = Evidence(hessian=x.T @ x / len(x), count=len(x))
    recipe = parse_recipe(fmt, "search", rounding, options={"iterations": 40} if rounding == "learned" else {})
    plain, moved = (quantize_layer("l", w, recipe, evidence, pairs=one) for one in (None, pairs))
    decode = lambda result: fmt.dequantize(result.tensors, (32, 64))  # noqa: E731
    assert plain.judgement.inputs_left is None and moved.judgement.inputs_left < 1
    assert missing(w, decode(moved), pairs_of(24, k=64, off=1.0, seed=7)) < missing(
        w, decode(plain), pairs_of(24, k=64, off=1.0, seed=7)
    )
    assert moved.judgement.error <= moved.judgement.nearest_error


def test_nothing_ends_above_rounding_the_layers_own_weight():
    """A followed weight that suits no grid loses against the plain one, which is then taken, and the note says so."""
    w = torch.full((16, 32), 1.0)
    x = [torch.randn(40, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    pairs = InputPairs(x, [one * 1.02 for one in x])  # wants W / 1.02, which NVFP4 cannot hold as well as 1.0
    rows = torch.cat(x)
    result = quantize_layer(
        "l", w, parse_recipe(NVFP4, "search", "nearest"), Evidence(hessian=rows.T @ rows / len(rows)), pairs=pairs
    )
    objective, target = Objective(rows.T @ rows / len(rows)), follow(w, pairs, nothing).weight
    ended, own, moved = (
        objective.loss(NVFP4.dequantize(tensors, (16, 32)) - target)
        for tensors in (result.tensors, NVFP4.quantize(w), NVFP4.quantize(target))
    )
    assert ended <= min(own, moved) * 1.0001
    assert own != moved


class Branches(nn.Module):
    """Two branches, a layer used twice, one called by keyword, one that is not watched."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.twice, self.out, self.free = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x, rounds=1):
        left, right = torch.tanh(self.a(x)), torch.tanh(self.b(input=x))
        for _ in range(1 + rounds):
            left = torch.tanh(self.twice(left))
        return self.out(self.free(left + right))


NAMES = ("out", "twice", "b", "a")


def ended(lockstep):
    return all(call.done for call in lockstep._calls)


def watched(model):
    return OrderedDict((name, model.get_submodule(name)) for name in NAMES)


def test_a_look_tells_order_and_size():
    model = Branches()
    found = visits(watched(model), lambda: model(torch.randn(7, 16)))
    assert found == Visits(("a", "b", "twice", "out"), frozenset({"twice"}), 7, 5 * 7 * 16 * 4)
    assert not model.a._forward_pre_hooks


def test_side_by_side_each_call_sees_what_it_would_see_alone():
    model, outputs = Branches().requires_grad_(False), {}
    inputs = [torch.randn(3 + call, 16) for call in range(3)]

    def call(number):
        return lambda: outputs.update({number: model(inputs[number % 3])})

    calls = [call(number) for number in range(6)]
    lockstep = Lockstep(watched(model), calls, frozenset({3, 4, 5}), visits(watched(model), calls[0]))
    other, order = Branches().requires_grad_(False), []
    with lockstep.stops() as stops:
        for stop in stops:
            order.append(stop.layer)
            weight = model.get_submodule(stop.layer).weight + 0.1
            other.get_submodule(stop.layer).weight.copy_(weight)
            assert sorted(stop.inputs) == list(range(6))
            lockstep.replace(stop.layer, weight, model.get_submodule(stop.layer).bias)
    assert order == ["a", "b", "twice", "out"] and ended(lockstep)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in watched(model).values())
    for number in range(3):
        assert torch.equal(outputs[number], model(inputs[number]))
        assert torch.equal(outputs[3 + number], other(inputs[number]))


def test_calls_that_skip_a_layer_wait_at_the_next_one():
    class Skips(Branches):
        def forward(self, x):
            return self.out(x if len(x) > 4 else self.a(x))

    model, seen = Skips(), []
    calls = [lambda: model(torch.randn(3, 16)), lambda: model(torch.randn(5, 16))]
    lockstep = Lockstep(watched(model), calls, frozenset(), visits(watched(model), calls[0]))
    with lockstep.stops() as stops:
        for stop in stops:
            seen.append((stop.layer, sorted(stop.inputs)))
    assert seen == [("a", [0]), ("out", [0, 1])]
    lockstep = Lockstep(watched(model), calls, frozenset(), visits(watched(model), calls[1]))
    with (
        pytest.raises(RequestError, match="a: only some calls of the model use this layer"),
        lockstep.stops() as stops,
    ):
        list(stops)
    assert ended(lockstep)


def test_a_layer_that_comes_again_after_it_is_gone_is_refused():
    class Returns(Branches):
        def forward(self, x, again=False):
            return self.a(self.out(self.a(x))) if again else self.out(self.a(x))

    model = Returns()
    calls = [
        lambda: model(torch.randn(3, 16)),
        lambda: model(torch.randn(3, 16)),
        lambda: model(torch.randn(3, 16), True),
    ]
    lockstep = Lockstep(watched(model), calls, frozenset({1, 2}), visits(watched(model), calls[0]))
    with (
        pytest.raises(RequestError, match="a: some calls of the model use this layer more often"),
        lockstep.stops() as stops,
    ):
        for stop in stops:
            lockstep.replace(stop.layer, model.a.weight, None)
    assert ended(lockstep)


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_in_a_call_comes_out_and_nothing_stays(failing):
    model = Branches()

    def call(number):
        def run():
            model(torch.randn(3, 16))
            if number == failing:
                raise KeyError("from the model")

        return run

    calls = [call(number) for number in range(3)]
    lockstep = Lockstep(
        watched(model), calls, frozenset(), Visits(("a", "b", "twice", "out"), frozenset({"twice"}), 1, 1)
    )
    with pytest.raises(KeyError, match="from the model"), lockstep.stops() as stops:
        list(stops)
    assert ended(lockstep) and not model.a._forward_pre_hooks


def test_a_model_may_change_autocast_around_its_layers():
    class Casts(Branches):
        def forward(self, x):
            x = self.a(x)
            with torch.autocast("cpu", torch.bfloat16):
                x = self.b(x)
                with torch.autocast("cpu", enabled=False):
                    x = self.twice(x.float())
                x = self.free(x)
            return self.out(x.float())

    model, outputs = Casts().requires_grad_(False), {}
    inputs = [torch.randn(4, 16) for _ in range(3)]
    calls = [lambda number=number: outputs.update({number: model(inputs[number])}) for number in range(3)]
    lockstep = Lockstep(watched(model), calls, frozenset(), visits(watched(model), calls[0]))
    with lockstep.stops() as stops:
        for stop in stops:
            assert not torch.is_autocast_enabled("cpu") and len(stop.inputs) == 3
    assert all(torch.equal(outputs[number], model(inputs[number])) for number in range(3))


def test_a_call_sees_the_context_of_its_caller_and_ends_in_any_order():
    """As a cancel scope, and under inference mode throughout, whatever its length."""
    seen, mode = ContextVar("seen", default=None), []

    class Asks(Branches):
        def forward(self, x, rounds):
            for _ in range(rounds):
                x = self.a(x) if rounds == 1 else self.twice(x)
                mode.append((torch.is_inference_mode_enabled(), seen.get()))
            return self.out(x)

    model = Asks()
    seen.set("outside")
    calls = [lambda rounds=rounds: model(torch.randn(2, 16), rounds) for rounds in (1, 3, 2)]
    lockstep = Lockstep(watched(model), calls, frozenset(), Visits(("a", "twice", "out"), frozenset({"twice"}), 1, 1))
    with lockstep.stops() as stops:
        assert [stop.layer for stop in stops] == ["a", "twice", "out"]
    assert mode == [(True, "outside")] * 6 and not torch.is_inference_mode_enabled()


def test_leaving_early_ends_every_call():
    model, finished = Branches(), []
    calls = [lambda: finished.append(model(torch.randn(3, 16))) for _ in range(3)]
    lockstep = Lockstep(watched(model), calls, frozenset(), visits(watched(model), calls[0]))
    finished.clear()
    with lockstep.stops() as stops:
        assert next(stops).layer == "a"
    assert ended(lockstep) and not finished and not model.a._forward_hooks


@pytest.mark.parametrize(
    ("rows", "recorded", "used"), [(4608, 64, 8), (128, 64, 64), (128, 1000, 64), (2048, 1000, 16), (100_000, 5, 5)]
)
def test_calls_are_used_up_to_some_ten_thousand_rows(rows, recorded, used):
    assert enough_calls(Visits(("a",), frozenset(), rows, 1), recorded) == used


def test_the_first_calls_are_of_as_many_pictures_as_there_are():
    assert spread([7, 7, 7, 3, 7, 3, 5]) == [0, 3, 6, 1, 5, 2, 4]
    assert spread(range(4)) == [0, 1, 2, 3]


def test_few_calls_of_many_are_chosen_across_the_pictures(deep, tmp_path, monkeypatch):
    from comfyui_quantpress.quant_core.pipeline import layer as layer_module

    model, source, calibration, draw = deep
    held, follow_plain = [], layer_module._follow
    monkeypatch.setattr(
        layer_module, "_follow", lambda w, pairs: held.append(len(pairs.held())) or follow_plain(w, pairs)
    )
    live = live_model(model, draw, 40, groups=[call // 10 for call in range(40)], most_calls=8)
    report = convert(
        Request(
            source,
            tmp_path / "q.safetensors",
            RECIPE,
            device="cpu",
            calibration=CalibrationUse(calibration),
            in_order=live is not None,
        ),
        live=live,
    )
    assert set(held) == {2} and min(layer.judgement.inputs_left or 1 for layer in report.quantized) < 1


class Deep(nn.Module):
    """Blocks with weights of their own and a skip connection, as a diffusion model has them."""

    def __init__(self, blocks=4, width=64):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(blocks)
        )
        self.spare = nn.ModuleList([nn.Sequential(nn.Linear(width, width))])  # nothing calls it

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """(model, its file, its calibration, draw(seed))."""
    folder = tmp_path_factory.mktemp("deep")
    model = Deep().eval().requires_grad_(False)
    save_file(model.state_dict(), folder / "model.safetensors")
    mixing = torch.randn(12, 64, generator=torch.Generator().manual_seed(5))
    draw = lambda seed: torch.randn(64, 12, generator=torch.Generator().manual_seed(seed)) @ mixing  # noqa: E731
    layers = linear_modules(model)
    collector = Collector(
        layers,
        plan_budget({name: layer.in_features for name, layer in layers.items()}),
        CaptureSettings(rows_per_step=64),
    )
    with collector.capture(model):
        for seed in range(40):
            model(draw(seed))
    save_calibration(collector.result(), folder / "calibration.safetensors")
    return model, folder / "model.safetensors", folder / "calibration.safetensors", draw


def live_model(model, draw, calls=24, **more):
    return LiveModel(linear_modules(model), [lambda seed=seed: model(draw(seed)) for seed in range(calls)], **more)


def error_of(model, draw, quantized, folder):
    dequantize(quantized, folder / "plain.safetensors", "fp32", overwrite=True)
    other = Deep().eval().requires_grad_(False)
    other.load_state_dict(load_file(folder / "plain.safetensors"))
    return float(sum((model(draw(seed)) - other(draw(seed))).square().sum() for seed in range(100, 120))) ** 0.5, other


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", ["nvfp4", "int8_rowwise"])
def test_in_order_ends_closer_to_the_model(deep, tmp_path, name, bias):
    model, source, calibration, draw = deep
    errors, recipe = [], parse_recipe(get_format(name), "search", "gptq")
    for live in (None, live_model(model, draw)):
        report = convert(
            Request(
                source,
                tmp_path / "q.safetensors",
                recipe,
                device="cpu",
                overwrite=True,
                calibration=CalibrationUse(calibration, bias),
                in_order=live is not None,
            ),
            live=live,
        )
        errors.append(error_of(model, draw, tmp_path / "q.safetensors", tmp_path)[0])
    assert errors[1] < 0.97 * errors[0]
    left = {layer.layer: layer.judgement.inputs_left for layer in report.quantized}
    assert left.pop("spare.0.0") is None and left["blocks.0.0"] == 1.0 and min(left.values()) < 0.95


@pytest.mark.parametrize("rank", [0, 8], ids=["", "with its low-rank part"])
def test_each_layer_sees_what_the_finished_file_delivers(deep, tmp_path, monkeypatch, rank):
    from comfyui_quantpress.quant_core.pipeline import layer as layer_module

    model, source, calibration, draw = deep
    seen = {}

    def watching(w, pairs):
        seen[len(seen)] = [y.clone() for y in pairs.delivered]
        return follow_plain(w, pairs)

    follow_plain = layer_module._follow
    monkeypatch.setattr(layer_module, "_follow", watching)
    lora = tmp_path / "lora.safetensors" if rank else None
    convert(
        Request(
            source,
            tmp_path / "q.safetensors",
            parse_recipe(NVFP4, "search", "gptq", options={"residual_rank": rank}),
            device="cpu",
            calibration=CalibrationUse(calibration, True),
            residual_lora=lora,
            in_order=True,
        ),
        live=live_model(model, draw, 6),
    )
    _, finished = error_of(model, draw, tmp_path / "q.safetensors", tmp_path)
    parts = load_file(lora) if rank else {}
    for name in {name.partition(".lora_")[0] for name in parts}:
        up, down = (parts[f"{name}.lora_{side}.weight"].float() for side in ("up", "down"))
        finished.get_submodule(name.removeprefix("diffusion_model.")).weight += up @ down
    assert len(parts) == (18 if rank else 0)
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, layer in linear_modules(finished, "blocks").items()
    ]
    for seed in range(6):
        finished(draw(seed))
    assert len(hooks) == len(seen) == 8
    for delivered, name in zip(seen.values(), inputs, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(delivered, inputs[name], strict=True)), name


def test_the_same_calls_give_the_same_bytes(deep, tmp_path):
    model, source, calibration, draw = deep
    for name in ("one", "two"):
        convert(
            Request(
                source,
                tmp_path / f"{name}.safetensors",
                RECIPE,
                device="cpu",
                calibration=CalibrationUse(calibration),
                in_order=True,
            ),
            live=live_model(model, draw, 8),
        )
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_missing_is_named(deep, tmp_path):
    model, source, calibration, draw = deep
    with pytest.raises(
        RequestError, match="of at least 4 pictures or prompts, better of twenty; the calibration holds 3 calls of 3"
    ):
        live_model(model, draw, 3)
    with pytest.raises(RequestError, match="the calibration holds 24 calls of 2. Capture more"):
        live_model(model, draw, groups=[call % 2 for call in range(24)])
    with pytest.raises(RequestError, match="needs the calibration"):
        convert(
            Request(source, tmp_path / "q.safetensors", RECIPE, device="cpu", in_order=True),
            live=live_model(model, draw),
        )
    other = Deep(blocks=2)
    with pytest.raises(
        RequestError, match=r"blocks\.2\.0: the model has no layer of this name and of shape \[128, 64\]"
    ):
        convert(
            Request(
                source,
                tmp_path / "q.safetensors",
                RECIPE,
                device="cpu",
                calibration=CalibrationUse(calibration),
                in_order=True,
            ),
            live=live_model(other, draw),
        )
    unused = LiveModel(linear_modules(model), [nothing] * 4)
    with pytest.raises(RequestError, match="use none of the layers"):
        convert(
            Request(
                source,
                tmp_path / "q.safetensors",
                RECIPE,
                device="cpu",
                calibration=CalibrationUse(calibration),
                in_order=True,
            ),
            live=unused,
        )
    assert not list(tmp_path.iterdir())


def test_cancel_ends_it_within_a_second_and_leaves_nothing(deep, tmp_path):
    model, source, calibration, draw = deep
    began = []

    def slow(seed):
        began.append(time.monotonic())
        time.sleep(0.05)
        model(draw(seed))

    live = LiveModel(linear_modules(model), [lambda seed=seed: slow(seed) for seed in range(200)], most_calls=200)
    with pytest.raises(Cancelled):
        convert(
            Request(
                source,
                tmp_path / "q.safetensors",
                RECIPE,
                device="cpu",
                calibration=CalibrationUse(calibration),
                in_order=live is not None,
            ),
            live=live,
            cancel=lambda: len(began) > 3,
        )
    assert time.monotonic() - began[3] < 1
    assert not list(tmp_path.iterdir()) and not model.blocks[0][0]._forward_pre_hooks


def test_the_room_bounds_the_calls(deep):
    model, _, _, draw = deep
    live = live_model(model, draw, 50)
    much = room(live, 10**12)
    some = room(live, much.nbytes - 30 * (much.nbytes - room(live, 0).nbytes) // 42)
    assert (much.calls, some.calls, room(live, 0).calls) == (50, 20, 8)
    assert much.nbytes - room(live, 0).nbytes >= 42 * 2 * 64 * 64 * 4  # two inputs of a layer for each further call
