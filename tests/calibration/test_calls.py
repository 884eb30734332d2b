"""Recorded model calls: what is recorded comes back to the bit, the sample is even and repeatable, files keep it."""

import json
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from comfyui_quantpress.quant_core.calibration.calibration import Calibration, ModelIdentity
from comfyui_quantpress.quant_core.calibration.calls import CallSample, call_group, call_key, is_recordable, record
from comfyui_quantpress.quant_core.calibration.merge import merge_files
from comfyui_quantpress.quant_core.calibration.statistics.layer import LayerStatistics, StatisticsSettings
from comfyui_quantpress.quant_core.calibration.storage import (
    METADATA_KEY,
    load_calibration,
    open_calibration,
    save_calibration,
)
from comfyui_quantpress.quant_core.checkpoint.header import TORCH_TO_CODE
from comfyui_quantpress.quant_core.errors import InputFileError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

LAYER = "blocks.0.up"
SETTINGS = StatisticsSettings(histogram_rows=50, reservoir_rows=2, sketch_size=4)
STRANGE = {
    "plain": object(),
    "in a list": [1, object()],
    "a set": {1},
    "bytes": b"x",
    "a key of another type": {1: 2},
    "huge": 2**63,
    "complex": 1j,
    "sparse": torch.eye(2).to_sparse(),
    "meta": torch.empty(2, device="meta"),
    "surrogate": "\ud800",
    "surrogate key": {"\udfff": 1},
    "subclass": type("Float", (float,), {})(1.0),
    "long text": "x" * 70_000,
}


def nested():
    """Every kind of node and a bf16 tensor, with keys that look like paths."""
    return {
        "x": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)),
        "c_crossattn": torch.arange(10).reshape(2, 5).bfloat16(),
        "none": None,
        "flag": True,
        "number": -7,
        "real": 0.1,
        "whole real": 1.0,
        "odd": [float("inf"), float("-inf"), float("nan")],
        "text": 'ü "quoted"',
        "": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "control": {
            "input": [torch.ones(1, dtype=torch.int64), None],
            "a.b": torch.tensor([True, False]),
            "a": {"b": torch.zeros(1)},
            "50%2E": torch.arange(3, dtype=torch.uint8),
        },
        "shapes": (torch.Size([1, 16, 8]), [(1, 2.0)], ()),
        "transformer_options": {"cond_or_uncond": [0, 1], "nothing": {}},
    }


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype is other.dtype and one.shape == other.shape
        assert torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other or (one != one and other != other)


def plain(value):
    """What comes back for a tuple subclass of torch's."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value] if isinstance(value, list) else tuple(plain(entry) for entry in value)
    return value


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for entry in entries for tensor in tensors_of(entry)]


def calibration(sample, seed=0):
    statistics = LayerStatistics(4, "cpu", settings=SETTINGS)
    statistics.see(torch.ones(3, 4))
    statistics.add(torch.ones(3, 4), 1.0, "cond")
    return Calibration(ModelIdentity({LAYER: (2, 4)}), {LAYER: statistics}, seed=seed, settings=SETTINGS, calls=sample)


def filled(limit, seed=0, calls=30, run=1, **budget):
    """The call's number is in its arguments."""
    sample = CallSample(limit, **budget)
    for number in range(calls):
        sample.offer(
            lambda number=number: {"number": number, "x": torch.full((8,), float(number))}, call_key(seed, run, number)
        )
    return sample


def numbers(sample):
    return [call.arguments["number"] for call in sample.calls()]


def expected(limit, offers):
    """offers: (seed, run, number)."""
    return [number for _, number in sorted((call_key(*offer), offer[2]) for offer in offers)[:limit]]


def changed(path, change=lambda manifest: None, tensors=lambda tensors: None):
    found = load_file(path)
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()[METADATA_KEY])
    change(manifest)
    tensors(found)
    target = path.with_name("changed.safetensors")
    save_file(found, target, {METADATA_KEY: json.dumps(manifest)})
    return target


# ---- recording -----------------------------------------------------------------------------------------------------
def test_a_recorded_call_is_an_equal_copy_of_its_own():
    original = nested()
    call = record(original)
    assert_same(plain(original), call.arguments)
    assert call.nbytes == sum(tensor.nbytes for tensor in tensors_of(original))
    original["x"].zero_()
    assert call.arguments["x"].any()


def test_recorded_tensors_are_dense_detached_normal_and_on_the_cpu():
    with torch.inference_mode():
        inference = torch.randn(3, 4).t()
    parts = {
        "inference": inference,
        "strided": torch.randn(6, 6)[::2, 1:],
        "expanded": torch.ones(1).expand(5),
        "parameter": nn.Parameter(torch.ones(2)),
        "part of a large one": torch.zeros(1000)[:2],
    }
    with torch.inference_mode():
        call = record(parts)
    for name, tensor in call.arguments.items():
        assert torch.equal(tensor, parts[name]), name
        assert (
            tensor.is_contiguous()
            and not tensor.is_inference()
            and not tensor.requires_grad
            and type(tensor) is torch.Tensor
        ), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("what", STRANGE)
def test_a_call_that_holds_anything_else_cannot_be_recorded(what):
    assert record({"x": torch.ones(1), "strange": STRANGE[what]}) is None and not is_recordable(STRANGE[what])


def test_a_call_that_holds_itself_cannot_be_recorded():
    loop = []
    loop.append(loop)
    assert record({"loop": loop}) is None


@pytest.mark.parametrize("dtype", TORCH_TO_CODE, ids=str)
def test_every_dtype_of_a_file_keeps_its_bits(dtype, tmp_path):
    tensor = torch.arange(32, dtype=torch.uint8).remainder(2).view(dtype)
    sample = CallSample(1)
    assert sample.offer(lambda: {"x": tensor}, 0)
    with open_calibration(save_calibration(calibration(sample), tmp_path / "c.safetensors")) as reader:
        assert_same(tensor, next(reader.calls()).arguments["x"])


# ---- the sample ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [0, 1, 7, 30, 50])
def test_the_smallest_keys_stay_in_their_order(limit):
    sample = filled(limit)
    assert numbers(sample) == expected(limit, [(0, 1, number) for number in range(30)])
    assert sample.offered == 30 and sample.refused == 0 and sample.nbytes == len(sample.kept) * 32


def test_keys_depend_on_seed_run_and_call_and_differ():
    assert call_key(1, 2, 3) == 7164752611279046  # the first 53 bits of the sha256 of "1, run 2, call 3"
    keys = {call_key(seed, run, call) for seed in range(4) for run in range(4) for call in range(64)}
    assert len(keys) == 4 * 4 * 64 and all(0 <= key < 2**53 for key in keys)
    assert sorted(numbers(filled(8))) != sorted(numbers(filled(8, seed=1)))


def test_every_call_is_kept_equally_often():
    kept = [number for seed in range(400) for number in numbers(filled(5, seed=seed, calls=20))]
    counts = [kept.count(number) for number in range(20)]
    assert min(counts) > 100 - 5 * 9 and max(counts) < 100 + 5 * 9  # mean 100, standard deviation 8.7


def test_a_call_that_is_not_kept_is_not_copied(monkeypatch):
    copies, plain_copy = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: copies.append(source) or plain_copy(self, source))
    sample, kept = CallSample(4), 0
    for number in range(100):
        kept += sample.offer(lambda number=number: {"x": torch.full((8,), float(number))}, call_key(0, 0, number))
    assert len(copies) == kept < 30
    assert not sample.offer(lambda: 1 / 0, 2**53) and sample.refused == 0  # it is not even looked at


def test_over_the_byte_budget_the_largest_keys_go_and_their_like_stays_out():
    everything = filled(30)
    sample = filled(30, max_bytes=32 * 10 + 31)
    assert numbers(sample) == numbers(everything)[:10] and sample.nbytes == 320
    sample = CallSample(10, max_bytes=100)
    assert sample.offer(lambda: {"x": torch.zeros(40, dtype=torch.uint8)}, 1)
    assert sample.offer(lambda: {"x": torch.zeros(50, dtype=torch.uint8)}, 3)
    assert not sample.offer(lambda: {"x": torch.zeros(20, dtype=torch.uint8)}, 4)
    assert not sample.offer(
        lambda: {"x": torch.zeros(10, dtype=torch.uint8)}, 5
    )  # it would fit; calls of key 4 did not
    assert sample.offer(lambda: {"x": torch.zeros(30, dtype=torch.uint8)}, 2)
    assert [kept.key for kept in sample.kept] == [1, 2] and sample.refused == 0
    assert not sample.offer(lambda: {"x": torch.zeros(101, dtype=torch.uint8)}, 0)
    assert [kept.key for kept in sample.kept] == [1, 2] and sample.refused == 1


def test_texts_have_a_budget_of_their_own_for_they_go_into_the_header():
    sample = CallSample(4096)
    for number in range(300):
        sample.offer(lambda: {"text": "ü" * 30_000}, number)
    assert 100 < len(sample.kept) < 150 and sample.offered == 300 and not sample.refused


def test_calls_that_cannot_be_recorded_are_counted_and_take_no_place():
    def recorded(number):
        if number % 4 == 3:
            return None
        return {"number": number, "control": object() if number % 4 == 1 else None}

    sample = CallSample(3)
    for number in range(20):
        sample.offer(partial(recorded, number), call_key(0, 0, number))
    assert numbers(sample) == expected(3, [(0, 0, number) for number in range(0, 20, 2)]) and 0 < sample.refused <= 10


def test_reset_begins_anew():
    sample = filled(4)
    sample.reset()
    assert not sample.kept and sample.offered == sample.refused == sample.nbytes == 0
    assert sample.offer(lambda: {"number": 0}, 2**52)


def test_negative_limits_are_a_mistake():
    with pytest.raises(ValueError, match="neither can be negative"):
        CallSample(-1)


def test_merging_is_as_if_one_sample_had_seen_all():
    one, other = filled(9, run=1), filled(9, run=2)
    one.merge(other)
    assert (
        numbers(one) == expected(9, [(0, run, number) for run in (1, 2) for number in range(30)]) and one.offered == 60
    )
    small, large = filled(2), filled(6, run=2, max_bytes=1000)
    small.merge(large)
    assert (small.limit, len(small.kept)) == (6, 6)
    none = CallSample()
    none.merge(other)
    assert numbers(none) == numbers(other) and none.limit == 9


def test_the_calls_of_a_run_are_one_group():
    groups = [call_group(seed, run, note) for seed in (0, 1) for run in (1, 2) for note in ("seed 5", "seed 6")]
    assert (
        len(set(groups)) == 8
        and call_group(0, 1, "seed 5") == groups[0]
        and all(0 <= group < 2**53 for group in groups)
    )


# ---- files ---------------------------------------------------------------------------------------------------------
def test_a_file_gives_the_calls_back_in_order(tmp_path):
    sample = CallSample(64)
    sample.offer(nested, 5, call_group(3, 1, "seed 8"))
    sample.offer(lambda: {"x": torch.ones(2)}, 2)
    sample.offer(lambda: {"x": object()}, 1)
    path = save_calibration(calibration(sample), tmp_path / "c.safetensors")
    with open_calibration(path) as reader:
        assert reader.call_count == 2 and reader.header.calls.nbytes == sample.nbytes
        first, second = reader.calls()
        assert_same({"x": torch.ones(2)}, first.arguments)
        assert_same(plain(nested()), second.arguments)
        assert second.nbytes == list(sample.calls())[1].nbytes
        assert [kept.group for kept in reader.header.calls.kept] == [0, call_group(3, 1, "seed 8")]
    loaded = load_calibration(path).calls
    assert (loaded.limit, loaded.max_bytes, loaded.offered, loaded.refused) == (64, sample.max_bytes, 3, 1)
    path.unlink()
    assert_same(second.arguments, list(loaded.calls())[1].arguments)  # the whole file is in memory


def test_calls_are_read_one_at_a_time(tmp_path, monkeypatch):
    from comfyui_quantpress.quant_core.checkpoint.source import Source

    path, read, plain_read = save_calibration(calibration(filled(5)), tmp_path / "c.safetensors"), [], Source.read
    monkeypatch.setattr(Source, "read", lambda self, name: read.append(name) or plain_read(self, name))
    with open_calibration(path) as reader:
        calls = reader.calls()
        assert not read
        for number in range(3):
            next(calls)
            assert read == [f"__calls__.{at}.x" for at in range(number + 1)]


def test_a_layer_of_any_name_keeps_its_tensors_apart(tmp_path):
    saved = calibration(filled(3))
    saved = replace(saved, statistics={"calls.0": saved.statistics[LAYER]}, model=ModelIdentity({"calls.0": (2, 4)}))
    loaded = load_calibration(save_calibration(saved, tmp_path / "c.safetensors"))
    assert numbers(loaded.calls) == numbers(saved.calls) and loaded.statistics["calls.0"].seen == 3


def test_a_file_without_calls_loads_with_none(tmp_path):
    path = save_calibration(calibration(CallSample()), tmp_path / "c.safetensors")
    with safe_open(path, "pt") as file:
        assert "calls" not in json.loads(file.metadata()[METADATA_KEY])
        assert not any("__calls__" in name for name in file.keys())  # noqa: SIM118 - safe_open cannot be iterated
    with open_calibration(path) as reader:
        assert reader.call_count == 0 and list(reader.calls()) == []


def test_merged_files_are_those_of_a_merge_in_memory(tmp_path):
    samples = [filled(9, run=1), filled(4, run=2), CallSample()]
    paths = [
        save_calibration(calibration(sample), tmp_path / f"{at}.safetensors") for at, sample in enumerate(samples)
    ]
    random.Random(0).shuffle(paths)
    found = merge_files(paths, tmp_path / "merged.safetensors")
    direct = load_calibration(paths[0])
    for path in paths[1:]:
        direct.merge(load_calibration(path))
    save_calibration(direct, tmp_path / "direct.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == (tmp_path / "direct.safetensors").read_bytes()
    assert found.calls == 9 and direct.calls.offered == 60


def break_tree(tree):
    return lambda manifest: manifest["calls"]["kept"][0].update(tree=tree)


def too_deep():
    tree = []
    for _ in range(30):
        tree = [tree]
    return {"dict": {"x": tree}}


@pytest.mark.parametrize(
    ("change", "tensors", "said"),
    [
        (lambda m: None, lambda t: t.pop("__calls__.1.x"), r"__calls__\.1\.x is missing; .* Capture again"),
        (break_tree({"dict": {"x": {"tensor": "y"}}}), lambda t: None, r"__calls__\.0\.y is missing"),
        (break_tree({"dict": {"x": {"lambda": 1}}}), lambda t: None, "damaged .*'lambda', which is unknown"),
        (break_tree({"dict": {"x": {"float": "1"}}}), lambda t: None, "damaged .*'float', which is unknown"),
        (break_tree({"dict": {"x": {}}}), lambda t: None, "damaged"),
        (break_tree([1]), lambda t: None, "damaged .*no arguments by name"),
        (break_tree(too_deep()), lambda t: None, "damaged .*nested too deeply"),
        (lambda m: m["calls"]["kept"][0].pop("key"), lambda t: None, "damaged .*key"),
        (lambda m: m.update(calls=[1]), lambda t: None, "damaged"),
        (lambda m: m["calls"].update(limit=-1), lambda t: None, "damaged .*neither can be negative"),
    ],
)
def test_damaged_calls_are_refused_by_name(tmp_path, change, tensors, said):
    path = save_calibration(calibration(filled(3)), tmp_path / "c.safetensors")
    assert load_calibration(changed(path)).calls.limit == 3
    with pytest.raises(InputFileError, match=said):
        load_calibration(changed(path, change, tensors))
