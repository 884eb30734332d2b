"""Watching a model: hooks come and go, rows are balanced and repeatable, budgets are kept, compiled models refused."""

import pytest
import torch
from comfyui_quantpress.quant_core.calibration.calibration import fingerprint
from comfyui_quantpress.quant_core.calibration.capture.budget import (
    LEAST_STAGED,
    MOST_STAGED,
    Budget,
    fixed_bytes,
    plan_budget,
)
from comfyui_quantpress.quant_core.calibration.capture.collector import (
    ABSMAX_WHOLE,
    CallContext,
    CaptureSettings,
    Collector,
)
from comfyui_quantpress.quant_core.calibration.capture.linear_modules import linear_modules
from comfyui_quantpress.quant_core.calibration.evidence import to_evidence
from comfyui_quantpress.quant_core.calibration.statistics.hessian import PANEL, HessianKind, Placement
from comfyui_quantpress.quant_core.calibration.statistics.layer import LayerStatistics, StatisticsSettings
from comfyui_quantpress.quant_core.calibration.statistics.selection import Part, chunk_labels, select_rows
from comfyui_quantpress.quant_core.calibration.statistics.staging import LARGEST_SLOTS
from comfyui_quantpress.quant_core.calibration.storage import save_calibration
from comfyui_quantpress.quant_core.errors import RequestError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.modulation = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(8, 16)

    def forward(self, x, c, fail=False):
        x = self.down(torch.relu(self.up(x))) + self.modulation(input=c)[:, None]
        if fail:
            raise KeyboardInterrupt
        return x


DEFAULT_BUDGET = Budget()


def collector(net, budget=DEFAULT_BUDGET, **settings):
    modules = linear_modules(net)
    return Collector(
        modules, plan_budget({name: m.in_features for name, m in modules.items()}, budget), CaptureSettings(**settings)
    )


def call(net, step, batch=2, tokens=50, dtype=torch.float32, **kwargs):
    g = torch.Generator().manual_seed(step)
    return net(
        torch.randn(batch, tokens, 16, generator=g).to(dtype), torch.randn(batch, 8, generator=g).to(dtype), **kwargs
    )


def hook_count(net):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules())


def contents(calibration):
    return {
        name: [
            s.sum.tolist(),
            s.absmax.tolist(),
            s.histogram.tolist(),
            s.reservoir.filled().tolist(),
            s.labels,
            s.hessian_sum().tolist(),
        ]
        for name, s in calibration.statistics.items()
    }


def run(watch, net, steps=4, labels=("uncond", "cond"), **kwargs):
    step = iter(range(steps))
    with watch.capture(net, lambda: CallContext(next(step), 0.5, labels)):
        for at in range(steps):
            call(net, at, **kwargs)
    return watch.result()


def test_statistics_are_those_of_the_true_inputs():
    net = Net()
    calibration = run(collector(net, holdout=0.0), net)
    x = torch.cat(
        [torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(step)).view(-1, 16) for step in range(4)]
    )
    evidence = to_evidence(calibration.statistics["up"])
    assert evidence.count == 400 and calibration.statistics["up"].labels == {"uncond": 200, "cond": 200}
    assert torch.allclose(evidence.hessian, x.T @ x / 400, rtol=1e-4, atol=1e-5)
    assert torch.equal(evidence.absmax, x.abs().amax(0))
    assert list(calibration.statistics) == ["up", "down", "modulation"]
    assert calibration.statistics["modulation"].seen == 8  # passed by keyword


def test_output_of_the_model_is_bit_identical_with_hooks():
    net = Net()
    plain, watch = call(net, 3), collector(net)
    with watch.capture(net):
        assert torch.equal(call(net, 3), plain)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_hooks_go_on_every_exit_and_what_was_seen_stays(error):
    net = Net()
    watch = collector(net)
    try:
        with watch.capture(net):
            assert hook_count(net) == 4
            call(net, 0)
            if error is KeyboardInterrupt:
                call(net, 1, fail=True)
            if error is ValueError:
                raise ValueError
    except (KeyboardInterrupt, ValueError) as err:
        assert isinstance(err, error)
    assert hook_count(net) == 0
    calibration = watch.result()
    assert calibration.runs[-1].completed is (error is None)
    assert calibration.statistics["up"].seen >= 100 and calibration.runs[-1].steps


def test_hooks_go_when_a_later_hook_cannot_be_set(monkeypatch):
    net = Net()
    watch = collector(net)

    def refuse(*args, **kwargs):
        raise ValueError("no hook")

    monkeypatch.setattr(net.modulation, "register_forward_pre_hook", refuse)
    with pytest.raises(ValueError, match="no hook"), watch.capture(net):
        pytest.fail("must not be reached")
    assert hook_count(net) == 0


def test_the_same_seed_gives_the_same_calibration_and_another_seed_another():
    net = Net()
    one, two = (contents(run(collector(net, seed=5, rows_per_step=20), net)) for _ in range(2))
    assert one == two
    assert one != contents(run(collector(net, seed=6, rows_per_step=20), net))


def test_a_whole_run_repeated_gives_the_same_file_byte_by_byte(tmp_path):
    files = []
    for name in ("one", "again"):
        net = Net().to(torch.bfloat16)
        watch = collector(net, seed=5, rows_per_step=20)
        with torch.inference_mode():
            run(watch, net, dtype=torch.bfloat16)
            run(watch, net, steps=2, dtype=torch.bfloat16)
        files.append(save_calibration(watch.result(), tmp_path / f"{name}.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_cancelled_run_keeps_exactly_what_was_sampled_before():
    net = Net()
    whole, cut = collector(net, rows_per_step=20), collector(net, rows_per_step=20)
    run(whole, net, steps=2)
    step = iter(range(9))
    with pytest.raises(KeyboardInterrupt), cut.capture(net, lambda: CallContext(next(step), 0.5, ("uncond", "cond"))):
        call(net, 0), call(net, 1)
        raise KeyboardInterrupt
    assert contents(whole.result()) == contents(cut.result())
    assert cut.result().runs[0].steps == whole.result().runs[0].steps and not cut.result().runs[0].completed


def test_memory_still_to_come_is_the_plan_less_what_the_seen_layers_hold():
    net = Net()
    modules, watch = linear_modules(net), collector(net)
    plan = plan_budget({name: m.in_features for name, m in modules.items()}, Budget())
    assert watch.missing_device_bytes() == plan.device_bytes
    run(watch, net, steps=1)
    kept = sum(
        t.nbytes
        for s in watch.result().statistics.values()
        for t in (s.absmax, s.sum, s.square_sum, s.histogram, s.reservoir.rows, s.hessian.total())
    )
    assert watch.missing_device_bytes() == plan.device_bytes - kept
    watch.reset()
    assert watch.missing_device_bytes() == plan.device_bytes


def test_reset_and_run_again_gives_the_same():
    net = Net()
    watch = collector(net, rows_per_step=20)
    first = contents(run(watch, net))
    watch.reset()
    assert watch.result().statistics == {}
    assert contents(run(watch, net)) == first


def test_runs_accumulate_and_merge_like_one_capture():
    net = Net()
    watch = collector(net, holdout=0.0)
    run(watch, net)
    both = run(watch, net, steps=2)
    one, two = collector(net, holdout=0.0), collector(net, holdout=0.0)
    merged = run(one, net)
    merged.merge(run(two, net, steps=2))
    assert len(both.runs) == len(merged.runs) == 2
    for name in both.statistics:
        a, b = both.statistics[name], merged.statistics[name]
        assert a.seen == b.seen and torch.equal(a.histogram, b.histogram)
        assert torch.allclose(a.hessian_sum(), b.hessian_sum(), rtol=1e-5, atol=1e-4)


def test_cap_balances_steps_and_labels_whatever_the_calls():
    net = Net()
    watch = collector(net, rows_per_step=24, holdout=0.0)
    contexts = iter(
        [
            CallContext(0, 1.0, ("cond",)),
            CallContext(0, 1.0, ("uncond",)),
            CallContext(1, torch.tensor(0.5), ("cond", "uncond")),
            CallContext(1, torch.tensor(0.5), ("cond",)),
        ]
    )
    with watch.capture(net, lambda: next(contexts)):
        call(net, 0, tokens=80), call(net, 1, tokens=10), call(net, 2, tokens=60), call(net, 3)
    record = watch.result().runs[0]
    assert record.steps == {0: 24 + 20, 1: 48}
    assert record.sigmas == {0: 1.0, 1: 0.5}
    assert watch.result().statistics["up"].labels == {"cond": 48, "uncond": 20 + 24}
    assert watch.result().statistics["up"].seen == 160 + 20 + 120 + 100  # every row counts for the absmax


def test_a_strided_absmax_sees_every_row_over_the_calls():
    net, rows = nn.Sequential(nn.Linear(4, 4)), ABSMAX_WHOLE + 2
    x = torch.arange(4.0 * rows).view(rows, 4)
    watch, seen = collector(net, absmax_stride=3), []
    with watch.capture(net):
        for _ in range(3):
            net(x)
            statistics = watch.result().statistics["0"]
            seen.append((statistics.seen, statistics.absmax.tolist()))
    # 1026 rows, a third each time: the last row of each is 1023, 1024 and 1025.
    assert seen == [(342, x[1023].tolist()), (684, x[1024].tolist()), (1026, x[1025].tolist())]


def test_an_input_with_few_rows_is_read_whole_whatever_the_stride():
    net = nn.Sequential(nn.Linear(4, 4))
    watch, x = collector(net, absmax_stride=500), torch.arange(28.0).view(7, 4)
    with watch.capture(net):
        net(x)
    assert watch.result().statistics["0"].absmax.tolist() == x[6].tolist() and watch.result().statistics["0"].seen == 7


def test_more_calls_than_there_are_slots_lose_no_largest_value():
    net = nn.Sequential(nn.Linear(3, 3))
    watch = collector(net)
    with watch.capture(net):
        for call_number in range(2 * LARGEST_SLOTS + 5):
            x = torch.zeros(2, 3)
            x[0, call_number % 3] = -float(100 - call_number)
            net(x)
    assert watch.result().statistics["0"].absmax.tolist() == [100.0, 99.0, 98.0]


def test_layers_that_keep_only_their_diagonal_give_a_quarter_of_the_rows():
    net = Net()
    for hessians, rows in ((True, 48), (False, 12)):
        found = run(collector(net, Budget(hessians=hessians), rows_per_step=24, holdout=0.0), net, steps=1)
        assert int(found.statistics["up"].count) == rows


@pytest.mark.parametrize("wrong", [{"rows_per_step": 0}, {"absmax_stride": 0}, {"holdout": 1.0}, {"holdout": -0.1}])
def test_capture_settings_refuse_nonsense(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        CaptureSettings(**wrong)


def test_held_out_rows_are_in_no_other_statistic():
    net = Net()
    watch = collector(net, holdout=0.25, rows_per_step=40)
    seen = []
    handle = net.up.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 16)))
    calibration = run(watch, net)
    handle.remove()
    statistics = calibration.statistics["up"]
    held = statistics.reservoir.filled()
    x = torch.cat(seen)
    is_held = (x.bfloat16()[:, None] == held[None]).all(-1).any(-1)
    assert (
        int(is_held.sum())
        == len(held)
        == statistics.reservoir.size - int((statistics.reservoir.keys == -torch.inf).sum())
    )
    # 4 steps x 2 labels x 40 rows, a quarter of each held out: all of them fit the reservoir of 128.
    assert len(held) == 80 and int(statistics.count) == 240


def test_weighting_is_asked_per_context_and_label():
    net = Net()
    asked = set()

    def weight(context, label):
        asked.add((context.step, label))
        return {"cond": 2.0, "uncond": 0.0}[label]

    calibration = run(collector(net, weighting=weight, weighting_name="cond only", holdout=0.0), net, steps=2)
    statistics = calibration.statistics["up"]
    assert asked == {(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")}
    assert statistics.labels == {"cond": 100} and float(statistics.weight) == 200
    assert calibration.weighting == "cond only"
    with pytest.raises(RequestError, match="'bad' gave -1"):
        run(collector(net, weighting=lambda context, label: -1.0, weighting_name="bad"), net)
    assert hook_count(net) == 0


def test_works_in_inference_mode_and_the_sums_live_on():
    net = Net()
    watch = collector(net)
    with torch.inference_mode():
        run(watch, net)
    run(watch, net)  # in-place on what the first run made
    assert watch.result().statistics["up"].seen == 800
    assert not watch.result().statistics["up"].absmax.is_inference()


def test_autocast_around_the_model_does_not_round_the_sums():
    net = Net()
    plain = contents(run(collector(net), net, steps=1))
    with torch.autocast("cpu", torch.bfloat16):
        cast = contents(run(collector(net), net, steps=1))
    assert plain["up"] == cast["up"]


def test_a_default_device_set_around_the_model_changes_nothing():
    net = Net()
    x, c = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 8)

    def capture():
        watch = collector(net, rows_per_step=20)
        with watch.capture(net):
            net(x, c)
        return contents(watch.result())

    with torch.device("meta"):  # as some loaders do; what is made without a device lands there
        inside = capture()
    assert inside == capture()


def test_bf16_model_gives_float32_statistics():
    net = Net().to(torch.bfloat16)
    calibration = run(collector(net), net, dtype=torch.bfloat16)
    assert calibration.statistics["up"].hessian_sum().dtype is torch.float32


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 16), (2, 3, 4, 16), (0, 16)])
def test_inputs_of_any_rank(shape):
    layer = nn.Sequential(nn.Linear(16, 4))
    watch = collector(layer, holdout=0.0)
    with watch.capture(layer):
        layer(torch.ones(shape))
    rows = torch.ones(shape).numel() // 16
    assert watch.result().statistics["0"].seen == rows == int(watch.result().statistics["0"].count)


def test_compiled_models_are_refused():
    net = Net()
    compiled = torch.compile(net)
    with pytest.raises(RequestError, match="compiled"):
        linear_modules(compiled)
    inner = nn.Sequential(compiled)
    with pytest.raises(RequestError, match="^0: the model is compiled"):
        linear_modules(inner)
    watch = collector(net)
    net.up.compile()
    with pytest.raises(RequestError, match="^up: the model is compiled"), watch.capture(net):
        pytest.fail("must not be reached")
    assert hook_count(net) == 0


def test_layers_are_found_by_name_and_pattern():
    class Linear(nn.Module):  # as ComfyUI's mixed-precision one: no nn.Linear
        in_features, out_features = 4, 8

    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Linear())
    assert list(linear_modules(net)) == ["0", "2"] and list(linear_modules(net, "2")) == ["2"]
    with pytest.raises(RequestError, match="matches 'x'"):
        linear_modules(net, "x")


def test_fingerprint_is_the_same_in_any_float_type_and_tells_weights_apart():
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    prints = {fingerprint([("a", (4, 16), w.to(dtype))]) for dtype in (torch.bfloat16, torch.float32)}
    assert len(prints) == 1
    w[0, 0] += 1
    assert fingerprint([("a", (4, 16), w)]) not in prints


# --- choosing rows -------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(0, 30), st.integers(0, 40), st.floats(0, 0.9), st.integers(0, 2**40))
def test_chosen_rows_are_disjoint_capped_and_inside_their_chunk(chunks, size, most, holdout, seed):
    chosen = select_rows(chunks * size, [(str(i), 1.0, most) for i in range(chunks)], holdout, seed, "key")
    assert len(set(chosen.index.tolist())) == len(chosen.index) == sum(part.count for part in chosen.parts)
    taken = {str(i): [0, 0] for i in range(chunks)}
    for part, index in zip(chosen.parts, chosen.index.split([part.count for part in chosen.parts]), strict=True):
        assert all(int(part.label) * size <= row < (int(part.label) + 1) * size for row in index.tolist())
        taken[part.label][part.keys is not None] += part.count
        assert part.keys is None or (len(part.keys) == part.count and bool((part.keys <= 0).all()))
    for fitted, held in taken.values():
        assert fitted + held == min(most, size) and abs(held - (fitted + held) * holdout) <= 1


def test_holdout_share_is_kept_on_average_for_single_rows():
    held = sum(select_rows(1, [("", 1.0, 9)], 0.25, seed, "key").parts[0].keys is not None for seed in range(800))
    assert 150 < held < 250


def test_chunks_that_cannot_be_told_apart_have_no_labels():
    assert chunk_labels((4, 9, 16), ("cond", "uncond")) == ("cond", "uncond")
    assert chunk_labels((3, 9, 16), ("cond", "uncond")) == ()
    assert chunk_labels((16,), ("cond", "uncond")) == ()
    assert chunk_labels((3, 9, 16), ("cond",)) == ("cond",)


# --- the budget ----------------------------------------------------------------------------------------------------

SHAPES = {"a.wide": 4096, "b": 512, "c": 1024, "d": 512}


# Fixed: 14 MiB of small statistics and staged rows, and 16 MiB of scratch for the widest layer. Hessians: 64, 1, 4, 1.
@pytest.mark.parametrize(
    ("device", "host", "disk", "expected"),
    [
        (400, 0, 0, ["full device", "full device", "full device", "full device"]),
        (45, 400, 0, ["full host", "full device", "full device", "full device"]),
        (45, 0, 400, ["full disk", "full device", "full device", "full device"]),
        (64, 20, 0, ["sketch device", "full device", "full device", "full device"]),
        (45, 20, 0, ["sketch host", "full device", "full device", "full device"]),
        (37, 0, 0, ["diagonal -", "full device", "full device", "full device"]),
        (33, 2, 0, ["diagonal -", "full device", "diagonal -", "full device"]),
    ],
)
def test_narrow_layers_come_first_and_each_takes_the_best_place_left(device, host, disk, expected):
    plan = plan_budget(SHAPES, Budget(device * 2**20, host * 2**20, disk * 2**20))
    found = [f"{d.kind.value} {d.placement.value if d.placement else '-'}" for d in plan.decisions]
    assert [d.layer for d in plan.decisions] == list(SHAPES)
    assert found == expected
    assert all(text in plan.describe() for text in ("GiB", f"{plan.device_bytes / 2**30:.2f}"))


@settings(max_examples=100, deadline=None)
@example(
    [1, 1, 1, 1, 1589], 8709830, 0, 0, False
)  # all rows would wait in half of it, but not beside the scratch memory
@given(
    st.lists(st.integers(1, 9000), min_size=1, max_size=12),
    st.integers(0, 2**31),
    st.integers(0, 2**30),
    st.integers(0, 2**30),
    st.booleans(),
)
def test_the_plan_never_exceeds_the_budget(widths, device, host, disk, hessians):
    shapes, budget = {str(i): k for i, k in enumerate(widths)}, Budget(device, host, disk, hessians=hessians)

    def small(staged):
        kind = HessianKind.FULL if hessians else HessianKind.DIAGONAL
        return sum(fixed_bytes(k, StatisticsSettings(staged_rows=staged), kind) for k in widths)

    scratch = min(max(widths), PANEL) * max(widths) * 4
    if small(LEAST_STAGED) + scratch > device:
        with pytest.raises(RequestError, match="bytes on the device"):
            plan_budget(shapes, budget)
        return
    plan = plan_budget(shapes, budget)
    assert (
        small(plan.staged_rows) <= plan.device_bytes <= device and plan.host_bytes <= host and plan.disk_bytes <= disk
    )
    assert plan.staged_rows == 1024 or small(2 * plan.staged_rows) > min(device // 2, device - scratch)
    turned = plan_budget(dict(reversed(shapes.items())), budget)
    assert set(turned.decisions) == set(plan.decisions)
    if not hessians:
        assert all(d.kind is HessianKind.DIAGONAL for d in plan.decisions)


def test_the_largest_models_can_be_captured_within_the_nodes_own_limits():
    # Wan 14B: 40 blocks of nine layers with 5120 inputs and one with 13824.
    shapes = {f"{block}.{i}": 13824 if i == 9 else 5120 for block in range(40) for i in range(10)}
    plan = plan_budget(shapes, Budget())
    assert plan.staged_rows == LEAST_STAGED and plan.counts()["full on device"] > 15
    watch = Collector({"a": nn.Linear(8, 8)}, plan_budget({"a": 8}, Budget(device_bytes=60_000)))
    assert watch.settings.statistics.staged_rows == 512  # 1024 would take 35 kB, more than half


def test_hessians_in_ram_are_worked_in_less_often_where_the_device_has_room():
    shapes = {"narrow": 512, "wide": 8192}
    tight = plan_budget(shapes, Budget(device_bytes=130 * 2**20))
    roomy = plan_budget(shapes, Budget(device_bytes=200 * 2**20))
    wide = [plan.decision("wide") for plan in (tight, roomy)]
    assert [d.placement for d in wide] == [Placement.HOST] * 2 and wide[0].staged_rows < wide[
        1
    ].staged_rows <= MOST_STAGED
    assert roomy.decision("narrow").staged_rows is None
    net = nn.Linear(8192, 4).requires_grad_(False)
    watch = Collector(
        {"wide": net},
        plan_budget({"wide": 8192}, Budget(device_bytes=200 * 2**20)),
        CaptureSettings(rows_per_step=2000),
    )
    with watch.capture(net):
        net(torch.ones(2000, 8192))
        assert float(watch.result().statistics["wide"].weight) == 0  # they wait, though more than 1024


def test_fixed_bytes_are_what_the_statistics_really_take():
    for kind in (HessianKind.DIAGONAL, HessianKind.FULL):
        s, x = LayerStatistics(640, "cpu", kind), torch.zeros(4, 640, dtype=torch.bfloat16)
        s.see(x)
        s.stage(x, torch.arange(4), [Part("", 1.0, 4)])
        tensors = [
            s._largest._total,
            s._largest._slots,
            s.sum,
            s.square_sum,
            s.histogram,
            s.reservoir.rows,
            s._staged.rows,
        ]
        assert sum(t.nbytes for t in tensors) == fixed_bytes(640, s.settings, kind)


def test_every_placement_gives_the_same_evidence_for_the_same_run():
    net, found = Net(), {}
    for name, budget in {"device": Budget(), "host": Budget(2**20, 2**20, 0), "disk": Budget(2**20, 0, 2**20)}.items():
        modules = linear_modules(net)
        plan = plan_budget({n: m.in_features for n, m in modules.items()}, budget)
        forced = plan
        if name != "device":  # small layers fit the device: put them where the test wants them
            from dataclasses import replace

            forced = replace(
                plan,
                decisions=tuple(replace(d, kind=HessianKind.FULL, placement=Placement(name)) for d in plan.decisions),
            )
        found[name] = run(Collector(modules, forced), net)
    for name in ("host", "disk"):
        for layer in found["device"].statistics:
            a, b = (to_evidence(found[at].statistics[layer]).hessian for at in ("device", name))
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_disk_files_go_with_reset():
    net = Net()
    watch = collector(net)
    from dataclasses import replace

    watch._decisions = {k: replace(d, placement=Placement.DISK) for k, d in watch._decisions.items()}
    run(watch, net)
    folder = watch._disk_folder()
    assert len(list(folder.iterdir())) == 3
    watch.reset()
    assert not folder.exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("budget", [Budget(), Budget(hessians=False)], ids=["hessians", "diagonals"])
def test_watching_never_waits_for_the_gpu_and_sees_the_same_rows(budget):
    # So few staged rows that they are worked in within the watched calls.
    net, chosen = Net(), {"rows_per_step": 20, "statistics": StatisticsSettings(staged_rows=64)}
    on_cpu = run(collector(net, budget, **chosen), net, steps=12)
    inputs = []
    for at in range(12):  # as `call` makes them
        g = torch.Generator().manual_seed(at)
        inputs.append((torch.randn(2, 50, 16, generator=g).cuda(), torch.randn(2, 8, generator=g).cuda()))
    net.cuda()
    watch, step = collector(net, budget, **chosen), iter(range(12))
    with watch.capture(net, lambda: CallContext(next(step), 0.5, ("uncond", "cond"))):
        net(*inputs[0])  # makes the accumulators
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for x, c in inputs[1:]:
                net(x, c)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name, found in watch.result().statistics.items():
        wanted = on_cpu.statistics[name]
        assert int(found.count) == int(wanted.count) and torch.equal(found.reservoir.keys, wanted.reservoir.keys)
        assert torch.allclose(found.absmax.cpu(), wanted.absmax, rtol=1e-3, atol=1e-3)
        assert torch.allclose(found.mean_square().cpu(), wanted.mean_square(), rtol=1e-3, atol=1e-3)
        assert int(found.histogram.sum()) == int(wanted.histogram.sum())
        if budget.hessians:
            assert torch.allclose(found.hessian_sum().cpu(), wanted.hessian_sum(), rtol=1e-3, atol=1e-2)
