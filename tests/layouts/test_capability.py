"""What a device can do is known before a kernel is called, and the kernel is chosen from plain facts."""

import dataclasses
import logging

import pytest
import torch
from comfyui_quantpress.layouts import ability, capability, path, register_layouts, tensor_of_layer
from comfyui_quantpress.layouts import linear as maths
from comfyui_quantpress.layouts.capability import judge, linear_path
from comfyui_quantpress.layouts.kernels.weight import Geometry
from comfyui_quantpress.quant_core.formats import all_formats
from comfyui_quantpress.quant_core.numerics import triton_kernels
from torch.nn.functional import linear

FORMATS = [fmt for fmt in all_formats() if fmt.runtime.native_since is None]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
GOOD = {"is_rocm": False, "has_triton": True, "has_compiler": True}
HOPPER = judge((9, 0), "", "linux")
AMPERE = judge((8, 6), "", "linux")


def test_a_gpu_gets_the_kernels_that_its_generation_has():
    has = lambda able: [f.name for f in dataclasses.fields(able) if getattr(able, f.name) is True]  # noqa: E731
    assert has(HOPPER) == ["triton", "fp8_dot", "scaled_mm", "fast_16bit"] and HOPPER.reason == ""
    assert has(judge((8, 9), "", "linux")) == ["triton", "fp8_dot"]
    assert has(AMPERE) == ["triton"]
    assert has(judge((9, 0), "", "win32")) == ["triton", "fp8_dot", "fast_16bit"]


@pytest.mark.parametrize(
    "kind, capability_, change, reason",
    [
        ("cpu", (0, 0), {}, "cpu"),
        ("mps", (0, 0), {}, "mps"),
        ("cuda", (7, 5), {}, "7.5"),
        ("cuda", (9, 0), {"is_rocm": True}, "ROCm"),
        ("cuda", (9, 0), {"has_triton": False}, "triton is not installed"),
        ("cuda", (9, 0), {"has_compiler": False}, "C compiler"),
    ],
)
def test_a_device_without_kernels_says_why(kind, capability_, change, reason):
    answer = judge(capability_, triton_kernels.judge(kind, capability_, **{**GOOD, **change}), "linux")
    assert not (answer.triton or answer.fp8_dot or answer.scaled_mm) and reason in answer.reason


def test_a_device_is_asked_once_and_logged_once(caplog):
    capability._ability.cache_clear()
    with caplog.at_level(logging.INFO, logger=capability.logger.name):
        for _ in range(3):
            assert not ability(torch.device("cpu")).triton
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.INFO


@formats
def test_every_format_has_a_path_on_every_device(fmt, monkeypatch):
    assert path(fmt, torch.device("cpu")) == "dequantize"
    monkeypatch.setattr(capability, "ability", lambda device: HOPPER)
    decoded_by_kernels = "scaled_mm" if fmt.name == "float8_e4m3fn_rowwise" else "triton"
    want = "dequantize" if fmt.runtime.kernel is None else decoded_by_kernels
    assert path(fmt, torch.device("cuda")) == want


def test_no_format_loses_its_kernels_unseen():
    """Tests of kernels go through the formats that have them."""
    have = {fmt.name for fmt in FORMATS if fmt.runtime.kernel is not None}
    assert have >= {
        "float8_e4m3fn_rowwise",
        "float8_e4m3fn_blockwise",
        "float8_e4m3fn_block3d",
        "int8_blockwise",
        "int8_lodewise",
        "bnb_nf4",
        "bnb_fp4",
        "bnb_af4",
    }


ADA = judge((8, 9), "", "linux")
CPU = judge((0, 0), triton_kernels.judge("cpu", (0, 0), **GOOD), "linux")
NF4, INT8, FP8 = {"kind": "nibble", "cols": 64}, {"kind": "int8", "cols": 128}, {"kind": "fp8", "cols": 128}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    "able, weight, rows, dtype, chosen",
    [
        (HOPPER, NF4, 1, BF16, "gemv"),
        (HOPPER, NF4, 16, BF16, "decode_dot"),
        (HOPPER, NF4, 64, BF16, "decode"),
        (HOPPER, {**NF4, "n": 12288}, 64, BF16, "decode_dot"),
        (HOPPER, NF4, 256, BF16, "decode"),
        (HOPPER, NF4, 0, BF16, "dequantize"),
        (HOPPER, {**NF4, "cols": 48}, 256, BF16, "dequantize"),
        (HOPPER, NF4, 16, FP32, "decode"),
        (HOPPER, {**INT8, "rows": 128}, 4096, BF16, "scaled_dot"),
        (HOPPER, INT8, 256, BF16, "scaled_dot"),
        (HOPPER, INT8, 4096, BF16, "decode"),
        (ADA, INT8, 4096, BF16, "scaled_dot"),
        (HOPPER, INT8, 16, BF16, "decode_dot"),
        (HOPPER, INT8, 4096, FP32, "decode"),
        (HOPPER, {**FP8, "rows": 128}, 4096, FP16, "scaled_dot"),
        (HOPPER, {**FP8, "cols": 32}, 256, BF16, "decode"),
        (HOPPER, {**FP8, "cols": 3072}, 256, BF16, "scaled_mm"),
        (HOPPER, {**FP8, "cols": 3072}, 64, BF16, "scaled_dot"),
        (HOPPER, {**FP8, "cols": 3072}, 256, FP16, "scaled_dot"),
        (HOPPER, {**FP8, "cols": 3072, "n": 3073}, 256, BF16, "scaled_dot"),
        (ADA, {**FP8, "cols": 3072}, 256, BF16, "scaled_dot"),
        (HOPPER, {**FP8, "cols": 3080, "k": 3080}, 256, BF16, "scaled_dot"),
        (AMPERE, {**FP8, "cols": 3072}, 256, BF16, "decode"),
        (AMPERE, FP8, 16, BF16, "decode_dot"),
        (AMPERE, INT8, 4096, BF16, "scaled_dot"),
        (CPU, NF4, 1, BF16, "dequantize"),
    ],
    ids=str,
)
def test_the_kernel_follows_from_the_shape(able, weight, rows, dtype, chosen):
    n, k, group_rows = weight.get("n", 3072), weight.get("k", 3072), weight.get("rows", 1)
    geometry = Geometry(weight["kind"], (n, k), (n // group_rows, k // weight["cols"]), group_rows, weight["cols"])
    assert linear_path(geometry, rows, dtype, able) == chosen


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="here for machines without a GPU: runs the GPU's route in Triton's interpreter"
)
@formats
@pytest.mark.parametrize(
    "rows, dtype", [(2, torch.float16), (20, torch.float16), (70, torch.float16), (20, torch.float32)], ids=str
)
def test_the_gpus_route_gives_the_cpus_answer(fmt, rows, dtype, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: pip install --no-deps triton")
    monkeypatch.setattr(maths, "ability", lambda device: dataclasses.replace(HOPPER, scaled_mm=False))
    register_layouts()
    generator = torch.Generator().manual_seed(0)
    shape = (128, 128)
    tensors = fmt.quantize(torch.randn(shape, generator=generator))
    qt = tensor_of_layer(fmt, tensors, shape, dtype)
    x, bias = (torch.randn(s, generator=generator).to(dtype) for s in [(rows // 2, 2, 128), (128,)])
    with torch.inference_mode():
        got = linear(x, qt, bias)
    want = linear(x.float(), fmt.dequantize(tensors, shape), bias.float())
    activations = 0.04 if fmt.element.bits == 8 and rows > 16 and dtype is not torch.float32 else 0.0
    assert got.dtype is dtype and float((got - want).norm() / want.norm()) < 1e-3 + activations
