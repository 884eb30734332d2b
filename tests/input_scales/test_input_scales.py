"""input_scale: chosen as ComfyUI uses it, read from files, and patched in without touching another byte."""

import json

import pytest
import torch
from comfyui_quantpress.quant_core.calibration.statistics.layer import LayerStatistics
from comfyui_quantpress.quant_core.checkpoint.metadata import build_header_metadata, encode_config
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import InputFileError, OutputError, RequestError
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.input_scales.rule import (
    file_input_scales,
    read_input_scales,
    saturation_of,
    scales_from_magnitudes,
    scales_from_statistics,
    scales_from_weight_scales,
)
from comfyui_quantpress.quant_core.stored.layers import stored_layers
from comfyui_quantpress.quant_core.tools.input_scales import METADATA_KEY, patch_input_scales
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PREFIX = "model.diffusion_model."
FORMATS = {
    "blocks.0.fp8": "float8_e4m3fn",
    "blocks.0.e5m2": "float8_e5m2",
    "blocks.0.nv": "nvfp4",
    "blocks.0.row": "int8_rowwise",
    "blocks.0.nf4": "bnb_nf4",
    "blocks.0.mx": "mxfp8",
}


@pytest.fixture
def model(tmp_path):
    """A file with a layer of every kind, an untouched tensor, and metadata of somebody else's."""
    g, tensors, configs = torch.Generator().manual_seed(0), {}, {}
    for layer, name in FORMATS.items():
        w = torch.randn(64, 128, generator=g)
        fmt = get_format(name)
        tensors |= {f"{PREFIX}{layer}.{suffix}": t for suffix, t in fmt.quantize(w).items()}
        configs[PREFIX + layer] = fmt.config((64, 128), torch.bfloat16)
    full = PREFIX + "blocks.0.full"
    tensors |= {f"{full}.{suffix}": t for suffix, t in get_format("float8_e4m3fn").quantize(w).items()}
    configs[full] = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    tensors[PREFIX + "norm.weight"] = torch.randn(7, generator=g).bfloat16()
    tensors |= {f"{layer}.comfy_quant": encode_config(config) for layer, config in configs.items()}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"_quantization_metadata": build_header_metadata(configs), "author": "somebody"})
    return path


def bytes_of(path):
    return {
        name: (t.dtype, tuple(t.shape), t.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in load_file(path).items()
    }


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def captured(largest, k=128, rows=200):
    s = LayerStatistics(k, "cpu")
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(1))
    x = x / x.abs().max() * largest
    s.see(x)
    s.add(x.clone())
    return s


# --- choosing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "largest"), [("float8_e4m3fn", 448), ("float8_e5m2", 57344), ("nvfp4", 2688)])
def test_the_true_absmax_lands_on_the_largest_value(name, largest):
    rule = get_format(name).runtime.input_scale
    assert rule.scale_for(13.0) == pytest.approx(13 / largest)
    assert rule.scale_for(0.0) == 1.0
    with pytest.raises(RequestError, match="finite"):
        rule.scale_for(float("nan"))


def test_rules_agree_with_the_elements_of_the_formats():
    fp8, wide, nvfp4 = map(get_format, ("float8_e4m3fn", "float8_e5m2", "nvfp4"))
    assert fp8.runtime.input_scale.largest == fp8.element.max
    assert wide.runtime.input_scale.largest == wide.element.max
    assert nvfp4.runtime.input_scale.largest == nvfp4.element.max * fp8.element.max


def test_scales_from_statistics_cover_exactly_the_layers_that_use_one(model):
    statistics = {layer: captured(50.0) for layer in (*FORMATS, "blocks.0.full", "unknown")}
    with open_source(model) as source:
        layers = stored_layers(source)
        absmax = scales_from_statistics(layers, statistics)
        p99 = scales_from_statistics(layers, statistics, 99.0)
    assert absmax == {
        PREFIX + "blocks.0.fp8": pytest.approx(50 / 448),
        PREFIX + "blocks.0.nv": pytest.approx(50 / 2688),
        PREFIX + "blocks.0.e5m2": pytest.approx(50 / 57344),
    }
    assert all(p99[layer] < absmax[layer] for layer in absmax)


def test_text_encoder_presets_write_the_weight_scale(model):
    with open_source(model) as source:
        found = scales_from_weight_scales(source, stored_layers(source))
        assert found[PREFIX + "blocks.0.fp8"] == float(source.read(PREFIX + "blocks.0.fp8.weight_scale"))
    assert set(found) == {PREFIX + "blocks.0.fp8", PREFIX + "blocks.0.e5m2"}


def test_saturation_is_warned_of_as_comfyui_would_saturate(model):
    with open_source(model) as source:
        layers = {name.removeprefix(PREFIX + "blocks.0."): layer for name, layer in stored_layers(source).items()}
    (found,) = saturation_of(layers["fp8"], 500.0, None)
    assert "blocks.0.fp8: inputs reach 500, and no input_scale saturates them above 448" in found
    assert saturation_of(layers["fp8"], 400.0, None) == []
    assert saturation_of(layers["fp8"], 500.0, 2.0) == []
    (found,) = saturation_of(layers["nv"], 500.0, 0.1)
    assert "blocks.0.nv: inputs reach 500, and its input_scale 0.1 saturates them" in found
    assert saturation_of(layers["nv"], 500.0, None) == []
    assert all(saturation_of(layers[name], 500.0, scale) == [] for name in ("row", "full") for scale in (None, 0.1))
    exact = scales_from_magnitudes({layer.layer: layer for layer in layers.values()}, {"blocks.0.fp8": 500.0})
    assert saturation_of(layers["fp8"], 500.0, exact[PREFIX + "blocks.0.fp8"]) == []


# --- reading -------------------------------------------------------------------------------------------------------


def test_scales_from_json_and_from_another_model(tmp_path):
    (tmp_path / "s.json").write_text('{"blocks.0.fp8": 0.5, "blocks.0.nv.input_scale": 1, "a.weight": 2e-3}')
    assert read_input_scales(tmp_path / "s.json") == {"blocks.0.fp8": 0.5, "blocks.0.nv": 1.0, "a": 0.002}
    save_file(
        {
            "x.input_scale": torch.tensor(0.25),
            "y.scale_input": torch.tensor([3.0], dtype=torch.bfloat16),
            "x.weight": torch.zeros(2),
        },
        tmp_path / "m.safetensors",
    )
    assert read_input_scales(tmp_path / "m.safetensors") == {"x": 0.25, "y": 3.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "a JSON list was found"),
        ("{", "cannot be read as JSON"),
        ("{}", "holds no input scale"),
        ('{"a": "1"}', "a: a number is needed"),
        ('{"a": true}', "a number is needed"),
        ('{"a": 0}', "a has the input scale 0"),
        ('{"a": -1}', "above 0"),
        ('{"a": NaN}', "finite"),
    ],
)
def test_bad_json_is_refused(tmp_path, text, says):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(InputFileError, match=says):
        read_input_scales(tmp_path / "s.json")


def test_bad_tensor_files_are_refused(tmp_path):
    save_file({"x.input_scale": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(InputFileError, match=r"x.input_scale has shape \[3\]"):
        read_input_scales(tmp_path / "a.safetensors")
    save_file({"x.weight": torch.ones(3)}, tmp_path / "b.safetensors")
    with pytest.raises(InputFileError, match="holds no input scale"):
        read_input_scales(tmp_path / "b.safetensors")


# --- patching ------------------------------------------------------------------------------------------------------


def test_patched_file_differs_by_its_input_scales_alone(model, tmp_path):
    target = tmp_path / "patched.safetensors"
    report = patch_input_scales(
        model, target, {"blocks.0.fp8": 0.5, "diffusion_model.blocks.0.nv": 0.25}, method="by hand"
    )
    assert report.added == (PREFIX + "blocks.0.fp8", PREFIX + "blocks.0.nv") and not report.changed
    before, after = bytes_of(model), bytes_of(target)
    new = {name: after.pop(name) for name in set(after) - set(before)}
    assert after == before
    assert set(new) == {PREFIX + "blocks.0.fp8.input_scale", PREFIX + "blocks.0.nv.input_scale"}
    tensors = load_file(target)
    for name, value in ((PREFIX + "blocks.0.fp8.input_scale", 0.5), (PREFIX + "blocks.0.nv.input_scale", 0.25)):
        assert tensors[name].dtype is torch.float32 and tensors[name].shape == () and float(tensors[name]) == value
    old, now = metadata_of(model), metadata_of(target)
    record = json.loads(now.pop(METADATA_KEY))
    assert record["method"] == "by hand" and record["layers"] == 2
    assert now == old  # the layers' description, and somebody else's entries
    with open_source(target) as source:
        assert file_input_scales(source, stored_layers(source)) == {
            PREFIX + "blocks.0.fp8": 0.5,
            PREFIX + "blocks.0.nv": 0.25,
        }


def test_patching_again_changes_what_differs_and_keeps_what_agrees(model, tmp_path):
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    patch_input_scales(model, one, {"blocks.0.fp8": 0.5, "blocks.0.nv": 0.25})
    report = patch_input_scales(one, two, {"blocks.0.fp8": 0.5, "blocks.0.nv": 0.125})
    assert (
        report.kept == (PREFIX + "blocks.0.fp8",) and report.changed == (PREFIX + "blocks.0.nv",) and not report.added
    )
    before, after = bytes_of(one), bytes_of(two)
    assert [name for name in before if before[name] != after[name]] == [PREFIX + "blocks.0.nv.input_scale"]


@pytest.mark.parametrize("given, target", [("model", "model"), ("model", "link"), ("link", "model"), ("link", "link")])
def test_the_source_is_never_patched_in_place(model, tmp_path, given, target):
    (tmp_path / "link.safetensors").symlink_to(model)
    before = model.read_bytes()
    with pytest.raises(OutputError, match="the target is the same file as the source"):
        patch_input_scales(
            tmp_path / f"{given}.safetensors",
            tmp_path / f"{target}.safetensors",
            {"blocks.0.fp8": 0.5},
            overwrite=True,
        )
    assert model.read_bytes() == before and (tmp_path / "link.safetensors").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.safetensors", "model.safetensors"]


def test_layers_that_ignore_the_tensor_are_skipped_with_the_reason(model, tmp_path):
    scales = {
        "blocks.0.fp8": 0.5,
        "blocks.0.row": 0.5,
        "blocks.0.nf4": 0.5,
        "blocks.0.mx": 0.5,
        "blocks.0.full": 0.5,
        "no": 1.0,
    }
    report = patch_input_scales(model, tmp_path / "t.safetensors", scales)
    assert report.added == (PREFIX + "blocks.0.fp8",)
    assert report.skipped["blocks.0.row"] == "int8_tensorwise does not use input_scale"
    assert report.skipped["blocks.0.full"] == "its matrix multiplication is in full precision"
    assert "no quantized layer of this name" in report.skipped["no"] and len(report.skipped) == 5


@pytest.mark.parametrize(
    ("scales", "says"),
    [
        ({}, "nothing to patch: no scale was given"),
        ({"no": 1.0}, "nothing to patch: no: "),
        ({"blocks.0.fp8": 0.0}, "above 0"),
        ({"blocks.0.fp8": float("inf")}, "finite"),
        ({"blocks.0.fp8": 1e-60}, "beyond float32"),
    ],
)
def test_nothing_is_written_when_the_request_is_wrong(model, tmp_path, scales, says):
    with pytest.raises(RequestError, match=says):
        patch_input_scales(model, tmp_path / "t.safetensors", scales)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_existing_target_is_kept(model, tmp_path):
    (tmp_path / "t.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        patch_input_scales(model, tmp_path / "t.safetensors", {"blocks.0.fp8": 0.5})
    assert (tmp_path / "t.safetensors").read_bytes() == b"mine"


def test_legacy_files_get_the_legacy_name(tmp_path):
    tensors = get_format("float8_e4m3fn").quantize(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))
    save_file(
        {
            "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
            "a.weight": tensors["weight"],
            "a.scale_weight": tensors["weight_scale"],
        },
        tmp_path / "old.safetensors",
    )
    patch_input_scales(tmp_path / "old.safetensors", tmp_path / "new.safetensors", {"a": 0.5})
    assert float(load_file(tmp_path / "new.safetensors")["a.scale_input"]) == 0.5
