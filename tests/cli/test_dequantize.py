"""`quantpress dequantize`: the way back equals the formats' own decoding, for files of ours and of others."""

import json

import pytest
import torch
from comfyui_quantpress.cli.main import main
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.formats import all_formats
from comfyui_quantpress.quant_core.stored.layers import stored_layers
from comfyui_quantpress.quant_core.tools.dequantize import DTYPES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FORMATS = [fmt.name for fmt in all_formats()]
LAYER = "blocks.0.fc"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    generator = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file(
        {
            f"{LAYER}.weight": torch.randn(256, 256, generator=generator),
            f"{LAYER}.bias": torch.randn(256, generator=generator),
            "norm.weight": torch.ones(256).half(),
        },
        path,
        metadata={"author": "somebody"},
    )
    return path


def dequantize(source, target, *options: str) -> int:
    return main(["dequantize", str(source), str(target), *options])


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_comes_back_as_it_decodes(fmt, model, tmp_path, capsys):
    coded, back = tmp_path / "coded.safetensors", tmp_path / "back.safetensors"
    assert main(["quantize", str(model), str(coded), "--format", fmt]) == 0
    with open_source(coded) as src:
        expected = stored_layers(src)[LAYER].decode(src)
    for name, dtype in DTYPES.items():
        assert dequantize(coded, back, "--dtype", name, "--overwrite") == 0
        written, source = load_file(back), load_file(model)
        assert torch.equal(written.pop(f"{LAYER}.weight"), expected.to(dtype))
        assert written.keys() == source.keys() - {f"{LAYER}.weight"}
        assert all(torch.equal(written[key], source[key]) for key in written)
    assert f"1 layer decoded to fp32 (1 {fmt})" in capsys.readouterr().out


def test_the_header_says_what_was_decoded_and_no_longer_that_it_is_quantized(model, tmp_path):
    coded, back = tmp_path / "coded.safetensors", tmp_path / "back.safetensors"
    assert main(["quantize", str(model), str(coded), "--format", "bnb_nf4"]) == 0
    assert dequantize(coded, back) == 0
    with safe_open(back, "pt") as file:
        metadata = file.metadata()
    assert metadata["author"] == "somebody" and "_quantization_metadata" not in metadata
    record = json.loads(metadata["quantpress"])
    assert (
        record["dequantized"] == {"dtype": "bf16", "layers": {"bnb_nf4": 1}}
        and record["source"] == "coded.safetensors"
    )


def legacy_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "a.weight": torch.randn(16, 32, generator=generator).to(torch.float8_e4m3fn),
        "a.scale_weight": torch.tensor(0.25),
        "a.scale_input": torch.tensor(1.0),
        "b.weight": torch.randn(16, 32, generator=generator).bfloat16(),
        "b.scale_weight": torch.tensor(1.0),
        "b.bias": torch.zeros(16),
    }


def test_a_legacy_file_loses_marker_and_scales(tmp_path):
    source, target = tmp_path / "legacy.safetensors", tmp_path / "out.safetensors"
    tensors = legacy_tensors()
    save_file(tensors, source)
    assert dequantize(source, target, "--dtype", "fp32") == 0
    written = load_file(target)
    assert set(written) == {"a.weight", "b.weight", "b.bias"}
    assert torch.equal(written["a.weight"], tensors["a.weight"].float() * 0.25)
    assert torch.equal(written["b.weight"], tensors["b.weight"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_without_scales_is_cast_exactly(fp8, dtype, tmp_path):
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(fp8).float()
    values = values[torch.isfinite(values)].to(fp8)
    source, target = tmp_path / "cast.safetensors", tmp_path / "out.safetensors"
    save_file({"a.weight": values.reshape(2, -1)}, source)
    assert dequantize(source, target, "--dtype", dtype) == 0
    written = load_file(target)["a.weight"]
    assert written.dtype == DTYPES[dtype] and torch.equal(written.float().flatten(), values.float())


def assert_refused(source, target, capsys, *parts: str, options=()) -> None:
    assert dequantize(source, target, *options) == 1
    err = capsys.readouterr().err
    assert err.count("quantpress: error: ") == 1 and "Traceback" not in err
    assert [part for part in parts if part not in err] == []
    assert [path for path in target.parent.iterdir() if "out" in path.name] == []


def test_a_file_with_nothing_quantized_is_refused(model, tmp_path, capsys):
    assert_refused(model, tmp_path / "out.safetensors", capsys, "nothing in it is quantized")


def test_a_value_beyond_fp16_is_refused_and_fits_bf16(tmp_path, capsys):
    source, target = tmp_path / "big.safetensors", tmp_path / "out.safetensors"
    save_file(legacy_tensors() | {"a.scale_weight": torch.tensor(1e6)}, source)
    assert_refused(source, target, capsys, "a.weight", "--dtype bf16", options=("--dtype", "fp16"))
    assert dequantize(source, target) == 0


def test_a_layer_that_decodes_to_nan_is_refused(tmp_path, capsys):
    source = tmp_path / "nan.safetensors"
    save_file(legacy_tensors() | {"a.scale_weight": torch.tensor(float("nan"))}, source)
    assert_refused(source, tmp_path / "out.safetensors", capsys, "a.weight", "NaN")


@pytest.mark.parametrize("orphan", ["c.weight_scale", "c.scale_weight"])
def test_a_scale_without_its_layer_is_refused(orphan, tmp_path, capsys):
    source, target = tmp_path / "orphan.safetensors", tmp_path / "out.safetensors"
    save_file(legacy_tensors() | {orphan: torch.tensor(1.0)}, source)
    assert_refused(source, target, capsys, orphan, "belong to no quantized layer")
