"""A layer's JSON may record its shape and sizes. A record that its tensors contradict is found, in every format."""

import pytest
import torch
from comfyui_quantpress.cli.main import main
from comfyui_quantpress.quant_core.checkpoint.metadata import encode_config
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import InputFileError
from comfyui_quantpress.quant_core.formats import all_formats
from comfyui_quantpress.quant_core.pipeline.verify import check_file
from comfyui_quantpress.quant_core.stored.layers import stored_layers
from safetensors.torch import save_file

N, K = 256, 512
FORMATS = pytest.mark.parametrize("fmt", all_formats(), ids=lambda fmt: fmt.name)


def quantized(path, fmt, **recorded):
    fmt = fmt.for_shape((N, K))
    tensors = fmt.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)))
    config = fmt.config((N, K), torch.bfloat16) | recorded
    save_file(
        {f"blocks.0.fc.{s}": t for s, t in tensors.items()} | {"blocks.0.fc.comfy_quant": encode_config(config)}, path
    )
    return path


def errors(path):
    return [finding.message for finding in check_file(path).findings if finding.severity == "error"]


@FORMATS
def test_a_record_that_agrees_is_read(tmp_path, fmt):
    path = quantized(tmp_path / "m.safetensors", fmt, orig_shape=[N, K])
    assert errors(path) == []
    with open_source(path) as src:
        assert stored_layers(src)["blocks.0.fc"].shape == (N, K)


@FORMATS
@pytest.mark.parametrize("key", ["orig_shape", "shape"])
def test_a_record_that_its_tensors_contradict_is_an_error(tmp_path, capsys, fmt, key):
    wrong = {"orig_shape": None, "shape": None, key: [2 * N, K]}
    path = quantized(tmp_path / "m.safetensors", fmt, **wrong)
    assert any("blocks.0.fc" in text for text in errors(path))
    out = tmp_path / "out.safetensors"
    assert main(["dequantize", str(path), str(out)]) != 0
    assert "blocks.0.fc" in capsys.readouterr().err
    assert not out.exists()


@FORMATS
@pytest.mark.parametrize(
    "record",
    [
        {"orig_shape": "256x512"},
        {"orig_shape": [256]},
        {"shape": [256, "512"]},
        {"orig_shape": [256, -512]},
        {"group_size": "wide"},
        {"convrot_groupsize": [256]},
    ],
    ids=str,
)
def test_a_record_that_is_no_size_is_an_error_that_names_it(tmp_path, fmt, record):
    path = quantized(tmp_path / "m.safetensors", fmt, **{"orig_shape": None, **record})
    (key,) = record
    assert any("blocks.0.fc" in text and key in text for text in errors(path))
    with open_source(path) as src, pytest.raises(InputFileError, match=f"blocks.0.fc: {key}"):
        stored_layers(src)
