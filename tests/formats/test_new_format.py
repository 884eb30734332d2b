"""A format that nothing else knows by name: its file and its place in the list are enough for every command."""

import json
from dataclasses import dataclass

import pytest
import torch
from comfyui_quantpress.cli.main import main
from comfyui_quantpress.quant_core import formats
from comfyui_quantpress.quant_core.calibration.capture.budget import Budget, plan_budget
from comfyui_quantpress.quant_core.calibration.capture.collector import Collector
from comfyui_quantpress.quant_core.calibration.storage import save_calibration
from comfyui_quantpress.quant_core.formats.base import Format
from comfyui_quantpress.quant_core.formats.records import Runtime, TensorSpec
from comfyui_quantpress.quant_core.numerics.elements import INT4
from comfyui_quantpress.quant_core.numerics.packing import pack_nibbles, sign_extend_nibbles, unpack_nibbles
from comfyui_quantpress.quant_core.numerics.scales import Granularity, QParams
from safetensors.torch import load_file, save_file

LAYERS = ("blocks.0.fc1", "blocks.1.fc1")
ROWS, WIDTH = 128, 64


@dataclass(frozen=True, kw_only=True)
class Int4Rowwise(Format):
    def tensor_specs(self, shape):
        n, k = shape
        return TensorSpec("weight", torch.uint8, (n, k // 2)), TensorSpec("weight_scale", torch.float32, (n,))

    def pack(self, codes, qp, shape):
        return {"weight": pack_nibbles(codes, high_first=True), "weight_scale": qp.scale.reshape(-1).contiguous()}

    def unpack(self, tensors, shape):
        codes = sign_extend_nibbles(unpack_nibbles(tensors["weight"], high_first=True))
        return codes, QParams(tensors["weight_scale"].to(torch.float32).reshape(-1, 1))


TOY = Int4Rowwise(
    name="int4_rowwise",
    on_disk="int4_rowwise",
    title="INT4 per row",
    element=INT4,
    granularity=Granularity.ROW,
    k_multiple=2,
    runtime=Runtime("QuantPressToyLayout", native_since=None),
    error_bound=0.5 / 7 + 1e-5,
    source="this test",
)


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    monkeypatch.setattr(formats, "ALL", (*formats.ALL, TOY))


@pytest.fixture
def model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file({f"{layer}.weight": torch.randn(ROWS, WIDTH, generator=generator) for layer in LAYERS}, path)
    return path


def calibration_of(model, path):
    layers = {layer: torch.nn.Linear(WIDTH, ROWS, bias=False) for layer in LAYERS}
    collector = Collector(layers, plan_budget(dict.fromkeys(layers, WIDTH), Budget()))
    with torch.no_grad(), collector.capture(layers[LAYERS[0]], note="test"):
        for layer in layers.values():
            layer(torch.randn(300, WIDTH))
    return save_calibration(collector.result(), path)


def run(capsys, *args):
    code = main([*map(str, args), "--json"])
    out = capsys.readouterr().out
    assert code == 0, out
    return json.loads(out)


def quantized(model, *options):
    path = model.with_name("quantized.safetensors")
    assert main(["quantize", str(model), str(path), "--format", TOY.name, *map(str, options)]) == 0
    return path


def decoded(weight):
    return TOY.dequantize(TOY.quantize(weight), (ROWS, WIDTH))


def test_it_is_planned_written_shown_and_verified(model, capsys):
    path = model.with_name("planned.safetensors")
    planned = run(capsys, "quantize", model, path, "--format", TOY.name, "--dry-run")
    assert TOY.name in json.dumps(planned) and not path.exists()
    path = quantized(model)
    capsys.readouterr()
    assert TOY.name in json.dumps(run(capsys, "inspect", path))
    assert run(capsys, "verify", path, "--against", model)
    assert TOY.name in json.dumps(run(capsys, "formats"))


def test_it_dequantizes_to_what_it_decodes_to(model, capsys):
    back = model.with_name("back.safetensors")
    assert main(["dequantize", str(quantized(model)), str(back), "--dtype", "fp32"]) == 0
    weights, tensors = load_file(model), load_file(back)
    for layer in LAYERS:
        assert torch.equal(tensors[f"{layer}.weight"], decoded(weights[f"{layer}.weight"]))


@pytest.mark.parametrize("rounding", ["gptq", "learned", "stochastic"])
def test_algorithms_and_a_calibration_serve_it(model, tmp_path, rounding):
    calibration = calibration_of(model, tmp_path / "calibration.safetensors")
    options = ["--rounding", rounding, "--scales", "search", "--calibration", calibration]
    options += ["--option", "iterations=5"] if rounding == "learned" else []
    tensors, weights = load_file(quantized(model, *options)), load_file(model)
    for layer in LAYERS:
        stored = {suffix: tensors[f"{layer}.{suffix}"] for suffix in TOY.suffixes}
        weight = weights[f"{layer}.weight"]
        assert float((TOY.dequantize(stored, (ROWS, WIDTH)) - weight).norm() / weight.norm()) < 0.25


def test_its_layout_dequantizes_and_multiplies_without_a_kernel():
    pytest.importorskip("comfy_kitchen")
    from comfyui_quantpress.layouts import linear
    from comfyui_quantpress.layouts.kernels.weight import geometry_of
    from comfyui_quantpress.layouts.registry import _layout_class

    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    layout = _layout_class(TOY)
    codes, params = layout.quantize(weight)
    assert geometry_of(TOY, (ROWS, WIDTH)) is None
    assert torch.equal(layout.dequantize(codes, params), decoded(weight))
    x = torch.randn(3, WIDTH)
    expected = torch.nn.functional.linear(x, decoded(weight))
    assert torch.equal(linear.linear(TOY.name, x, codes, params, None), expected)
