"""Calibrations on disk: what is written comes back, merges exactly, and is refused where it does not belong."""

import json
import time
import weakref
from dataclasses import replace

import pytest
import torch
from comfyui_quantpress.quant_core.calibration.calibration import (
    Calibration,
    ModelIdentity,
    RunRecord,
    fingerprint,
    identity_of_source,
)
from comfyui_quantpress.quant_core.calibration.merge import Merged, merge_files
from comfyui_quantpress.quant_core.calibration.statistics.hessian import HessianKind
from comfyui_quantpress.quant_core.calibration.statistics.layer import LayerStatistics, StatisticsSettings
from comfyui_quantpress.quant_core.calibration.statistics.reservoir import draw_keys
from comfyui_quantpress.quant_core.calibration.storage import (
    METADATA_KEY,
    CalibrationReader,
    load_calibration,
    open_calibration,
    save_calibration,
)
from comfyui_quantpress.quant_core.cancel import cancel_scope
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import Cancelled, InputFileError, OutputError, RequestError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SETTINGS = StatisticsSettings(histogram_rows=50, reservoir_rows=6, sketch_size=4)
LAYERS = {"blocks.0.up": (24, 10), "blocks.0.down": (10, 24), "blocks.0.mod": (8, 12)}
KINDS = dict(zip(LAYERS, HessianKind, strict=True))


def calibration(seed=0, layers=LAYERS, fingerprint_="abc"):
    g, statistics = torch.Generator().manual_seed(seed), {}
    for layer, (_, k) in layers.items():
        s = LayerStatistics(k, "cpu", KINDS.get(layer, HessianKind.FULL), settings=SETTINGS)
        for label in ("cond", "uncond"):
            x = torch.randint(-9, 9, (40, k), generator=g).float()
            s.see(x)
            s.add(x[:30].clone(), 1.0, label)
            s.reservoir.offer(x, torch.arange(30, 40), draw_keys(10, 1.0, g))
        statistics[layer] = s
    run = RunRecord(
        "a cat", True, {0: 30, 1: 30}, {0: 1.0, 1: 0.25}, {"cond": 90, "uncond": 90}, ("style.safetensors",)
    )
    return Calibration(ModelIdentity(dict(layers), fingerprint_), statistics, (run,), seed, SETTINGS)


def same(one, other):
    assert one.in_features == other.in_features and one.kind is other.kind and one.settings == other.settings
    assert (one.seen, one.labels) == (other.seen, other.labels)
    for field in ("absmax", "sum", "square_sum", "weight", "count", "nonfinite", "histogram"):
        a, b = getattr(one, field), getattr(other, field)
        assert torch.equal(a, b) and a.dtype is b.dtype, field
    assert torch.equal(one.reservoir.rows, other.reservoir.rows) and torch.equal(
        one.reservoir.keys, other.reservoir.keys
    )
    a, b = one.hessian_sum(), other.hessian_sum()
    assert (a is None and b is None) or torch.equal(a, b)


def test_round_trip(tmp_path):
    saved = calibration()
    path = save_calibration(saved, tmp_path / "c.safetensors")
    loaded = load_calibration(path)
    assert list(loaded.statistics) == list(saved.statistics)
    for layer in LAYERS:
        same(loaded.statistics[layer], saved.statistics[layer])
    assert replace(loaded, statistics={}) == replace(saved, statistics={})
    with open_calibration(path) as reader:
        same(reader.statistics("blocks.0.mod"), saved.statistics["blocks.0.mod"])


def test_the_same_calibration_gives_the_same_bytes(tmp_path):
    one = save_calibration(calibration(), tmp_path / "1.safetensors").read_bytes()
    assert one == save_calibration(calibration(), tmp_path / "2.safetensors").read_bytes()


def test_the_documented_schema_is_what_a_plain_reader_finds(tmp_path):
    path = save_calibration(calibration(), tmp_path / "c.safetensors")
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()[METADATA_KEY])
    assert manifest["schema"] == 1 and manifest["seed"] == 0 and manifest["weighting"] == "uniform"
    assert manifest["model"] == {"fingerprint": "abc", "layers": {k: list(v) for k, v in LAYERS.items()}}
    assert manifest["runs"] == [
        {
            "note": "a cat",
            "completed": True,
            "steps": {"0": 30, "1": 30},
            "sigmas": {"0": 1.0, "1": 0.25},
            "labels": {"cond": 90, "uncond": 90},
            "loras": ["style.safetensors"],
        }
    ]
    assert manifest["layers"]["blocks.0.up"] == {"seen": 80, "labels": {"cond": 30, "uncond": 30}, "hessian": "full"}
    tensors = load_file(path)
    assert tensors["blocks.0.up.hessian"].shape == (55,) and tensors["blocks.0.down.hessian_sketch"].shape == (4, 24)
    assert "blocks.0.mod.hessian" not in tensors and tensors["blocks.0.mod.rows"].dtype is torch.bfloat16


def test_merging_files_adds_exactly(tmp_path):
    paths = [save_calibration(calibration(seed), tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    merged = load_calibration(paths[0])
    merged.merge(load_calibration(paths[1]))
    direct = calibration(1)
    direct.merge(calibration(2))
    for layer in LAYERS:
        same(merged.statistics[layer], direct.statistics[layer])
    assert len(merged.runs) == 2
    a, b, s = (calibration(seed).statistics["blocks.0.up"] for seed in (1, 2, 1))
    s.merge(b, "x")
    assert torch.equal(s.hessian_sum(), a.hessian_sum() + b.hessian_sum())


def test_files_are_merged_to_the_bytes_of_a_merge_in_memory(tmp_path):
    paths = [save_calibration(calibration(seed), tmp_path / f"{seed}.safetensors") for seed in (1, 2, 3)]
    found = merge_files(paths, tmp_path / "merged.safetensors")
    direct = calibration(1)
    direct.merge(calibration(2))
    direct.merge(calibration(3))
    save_calibration(direct, tmp_path / "direct.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == (tmp_path / "direct.safetensors").read_bytes()
    assert found == Merged(layers=3, runs=3)


def test_merging_files_never_holds_more_than_two_layers(tmp_path, monkeypatch):
    layers = {f"blocks.{i}": (4, 16) for i in range(12)}
    paths = [save_calibration(calibration(seed, layers), tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    alive, most, plain = weakref.WeakSet(), [], CalibrationReader.statistics

    def counted(reader, layer, device="cpu"):
        found = plain(reader, layer, device)
        alive.add(found)
        most.append(len(alive))
        return found

    monkeypatch.setattr(CalibrationReader, "statistics", counted)
    merge_files(paths, tmp_path / "merged.safetensors")
    assert len(most) == 24 and max(most) <= 3  # two of one layer, and the last layer's until it is replaced


def test_merging_unlike_files_names_them_and_writes_nothing(tmp_path):
    one = save_calibration(calibration(1), tmp_path / "one.safetensors")
    for name, other, said in (
        ("strange", calibration(fingerprint_="xyz"), "the weights differ"),
        ("late", replace(calibration(), weighting="late"), "weights its rows 'uniform'"),
        ("kind", calibration_of_kind(HessianKind.DIAGONAL), "blocks.0.up: .* a full Hessian, .* a diagonal"),
        (
            "sizes",
            sized(StatisticsSettings(histogram_rows=50, reservoir_rows=7, sketch_size=4)),
            "reservoir_rows is 6 in one calibration and 7",
        ),
    ):
        path = save_calibration(other, tmp_path / f"{name}.safetensors")
        with pytest.raises(RequestError, match=said):
            merge_files([one, path], tmp_path / "merged.safetensors")
    with pytest.raises(OutputError):
        merge_files([one, one], one, overwrite=True)
    assert not (tmp_path / "merged.safetensors").exists() and not list(tmp_path.glob("*.part"))


def calibration_of_kind(kind):
    found = calibration()
    found.statistics["blocks.0.up"] = LayerStatistics(10, "cpu", kind, settings=SETTINGS)
    return found


def sized(settings):
    statistics = {
        layer: LayerStatistics(k, "cpu", KINDS[layer], settings=settings) for layer, (_, k) in LAYERS.items()
    }
    return replace(calibration(), statistics=statistics, settings=settings)


def test_saving_tells_its_progress_and_stops_when_asked_leaving_nothing(tmp_path):
    seen = []
    path = save_calibration(calibration(), tmp_path / "c.safetensors", progress=seen.append)
    assert [state.layer for state in seen] == list(LAYERS) and [state.done_layers for state in seen] == [1, 2, 3]
    assert seen[-1].done_bytes == seen[-1].total_bytes < path.stat().st_size
    asked = iter([False, True])
    with pytest.raises(Cancelled), cancel_scope(lambda: next(asked)):
        save_calibration(calibration(), tmp_path / "d.safetensors", progress=lambda state: time.sleep(0.06))
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_layers_seen_in_one_run_only_are_kept_on_merging():
    first, second = calibration(1), calibration(2)
    del first.statistics["blocks.0.up"], second.statistics["blocks.0.mod"]
    first.merge(second)
    assert set(first.statistics) == set(LAYERS) and first.statistics["blocks.0.mod"].seen == 80


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (ModelIdentity({"blocks.0.up": (24, 10)}, "abc"), "the model has no blocks.0.down, blocks.0.mod"),
        (
            ModelIdentity(LAYERS | {"blocks.0.up": (24, 20)}, "abc"),
            r"blocks.0.up is \[24, 10\] in the calibration and \[24, 20\]",
        ),
        (ModelIdentity(LAYERS, "xyz"), "the weights differ"),
    ],
)
def test_another_model_is_refused_by_what_differs(other, says):
    with pytest.raises(RequestError, match=f"c.safetensors belongs to another model: {says}"):
        calibration().model.require_match(other, "c.safetensors")


def test_what_matches():
    model = calibration().model
    model.require_match(ModelIdentity(LAYERS | {"more": (1, 1)}, "abc"), "c")  # layers that were not captured
    model.require_match(ModelIdentity(LAYERS, ""), "c")  # an unknown fingerprint
    model.require_match(ModelIdentity(LAYERS, "xyz"), "c", other_weights=True)  # a fine-tune, asked for
    with pytest.raises(RequestError, match="the model has no"):
        model.require_match(ModelIdentity({}, "xyz"), "c", other_weights=True)


def test_merging_another_model_or_weighting_is_refused():
    with pytest.raises(RequestError, match="belongs to another model: the weights differ"):
        calibration().merge(calibration(fingerprint_="xyz"))
    with pytest.raises(RequestError, match="weights its rows 'uniform'"):
        calibration().merge(replace(calibration(), weighting="late"))


def test_an_empty_capture_is_refused(tmp_path):
    with pytest.raises(RequestError, match="the calibration is empty"):
        save_calibration(replace(calibration(), statistics={}), tmp_path / "c.safetensors")


def test_files_that_are_no_calibration_are_refused(tmp_path):
    plain = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2)}, plain)
    with pytest.raises(
        InputFileError, match="this is not a calibration.*Save Calibration or `quantpress calibration merge` wrote"
    ):
        load_calibration(plain)
    good = save_calibration(calibration(), tmp_path / "c.safetensors")
    tensors = load_file(good)
    with safe_open(good, "pt") as file:
        manifest = json.loads(file.metadata()[METADATA_KEY])

    def written(change=lambda manifest: None, drop=()):
        changed = json.loads(json.dumps(manifest))
        change(changed)
        path = tmp_path / "changed.safetensors"
        save_file({k: v for k, v in tensors.items() if k not in drop}, path, {METADATA_KEY: json.dumps(changed)})
        return path

    load_calibration(written())
    with pytest.raises(InputFileError, match="schema 9"):
        load_calibration(written(lambda m: m.update(schema=9)))
    with pytest.raises(InputFileError, match="damaged .*model"):
        load_calibration(written(lambda m: m.pop("model")))
    with pytest.raises(InputFileError, match="blocks.0.up.absmax is missing"):
        load_calibration(written(drop=("blocks.0.up.absmax",)))
    with pytest.raises(InputFileError, match="blocks.0.up.hessian is F32"):
        load_calibration(
            written(
                lambda m: (
                    m["model"]["layers"].update({"blocks.0.up": [24, 11]})
                    or tensors.update(
                        {f"blocks.0.up.{f}": torch.zeros(11) for f in ("absmax",)}
                        | {f"blocks.0.up.{f}": torch.zeros(11, dtype=torch.float64) for f in ("sum", "square_sum")}
                        | {"blocks.0.up.rows": torch.zeros(6, 11, dtype=torch.bfloat16)}
                    )
                )
            )
        )


def test_an_existing_file_is_kept_unless_overwriting(tmp_path):
    path = save_calibration(calibration(), tmp_path / "c.safetensors")
    with pytest.raises(OutputError, match="exists"):
        save_calibration(calibration(1), path)
    save_calibration(calibration(1), path, overwrite=True)
    assert load_calibration(path).seed == 1


def test_table_names_the_outlier_channels():
    c = calibration()
    c.statistics["blocks.0.up"].absmax[7] = 900.0
    row = c.table()[0]
    assert (row.layer, row.in_features, row.seen, row.sampled, row.hessian) == ("blocks.0.up", 10, 80, 60, "full")
    assert row.channels[0][:2] == (7, 900.0) and row.channels[0][2] == pytest.approx(900 / row.rms)
    assert row.absmax == 900.0 and row.p999 <= 10.0


def test_a_file_and_the_same_weights_in_memory_have_one_identity(tmp_path):
    g = torch.Generator().manual_seed(0)
    weights = {layer: torch.randn(shape, generator=g) for layer, shape in LAYERS.items()}
    save_file({f"model.{k}.weight": v.bfloat16() for k, v in weights.items()}, tmp_path / "m.safetensors")
    with open_source(tmp_path / "m.safetensors") as source:
        found = identity_of_source(source, {layer: f"model.{layer}.weight" for layer in LAYERS})
        in_memory = fingerprint((layer, tuple(w.shape), w) for layer, w in weights.items())
        assert found == ModelIdentity(LAYERS, in_memory)
    save_file({"a.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "q.safetensors")
    with open_source(tmp_path / "q.safetensors") as source, pytest.raises(RequestError, match="unquantized"):
        identity_of_source(source, {"a": "a.weight"})
