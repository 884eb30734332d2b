"""What a device can do is known before a kernel is called, and the kernel is chosen from plain facts."""
import dataclasses
import logging

import pytest
import torch
from torch.nn.functional import linear

from comfyui_quantpress.layouts import ability, capability, path, register_layouts, tensor_of_layer
from comfyui_quantpress.layouts import linear as maths
from comfyui_quantpress.layouts.capability import Ability, Problem, judge, linear_path
from comfyui_quantpress.quant_core.format import all_formats

FORMATS = [fmt for fmt in all_formats() if fmt.runtime.native_since is None]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
GOOD = {"is_rocm": False, "has_triton": True, "has_compiler": True, "platform": "linux"}
HOPPER = judge("cuda", (9, 0), **GOOD)
AMPERE = judge("cuda", (8, 6), **GOOD)


def test_a_gpu_gets_the_kernels_that_its_generation_has():
    assert HOPPER == Ability(triton=True, fp8_dot=True, scaled_mm=True, reason="")
    assert judge("cuda", (8, 9), **GOOD) == Ability(True, True, False, "")
    assert AMPERE == Ability(True, False, False, "")
    assert not judge("cuda", (9, 0), **{**GOOD, "platform": "win32"}).scaled_mm


@pytest.mark.parametrize("kind, capability_, change, reason", [
    ("cpu", (0, 0), {}, "cpu"), ("mps", (0, 0), {}, "mps"), ("cuda", (7, 5), {}, "7.5"), ("cuda", (9, 0), {"is_rocm": True}, "ROCm"),
    ("cuda", (9, 0), {"has_triton": False}, "triton is not installed"), ("cuda", (9, 0), {"has_compiler": False}, "C compiler"),
])
def test_a_device_without_kernels_says_why(kind, capability_, change, reason):
    answer = judge(kind, capability_, **{**GOOD, **change})
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
    want = "scaled_mm" if fmt.name == "float8_e4m3fn_rowwise" else "triton"
    assert path(fmt, torch.device("cuda")) == want


BASE = Problem("nibble", 256, 3072, 3072, 1, 64, torch.bfloat16)


@pytest.mark.parametrize("able, changes, chosen", [
    (HOPPER, {"m": 1}, "gemv"),
    (HOPPER, {"m": 16}, "decode_dot"),
    (HOPPER, {}, "decode"),
    (HOPPER, {"m": 0}, "dequantize"),
    (HOPPER, {"group_cols": 48}, "dequantize"),
    (HOPPER, {"dtype": torch.float32}, "decode"),
    (HOPPER, {"kind": "int8", "group_cols": 128}, "scaled_dot"),
    (HOPPER, {"kind": "int8", "group_cols": 128, "dtype": torch.float32}, "decode"),
    (HOPPER, {"kind": "fp8", "group_cols": 128, "group_rows": 128}, "scaled_dot"),
    (HOPPER, {"kind": "fp8", "group_cols": 32}, "decode"),
    (HOPPER, {"kind": "fp8", "group_cols": 3072}, "scaled_mm"),
    (HOPPER, {"kind": "fp8", "group_cols": 3072, "dtype": torch.float16}, "scaled_dot"),
    (HOPPER, {"kind": "fp8", "group_cols": 3072, "n": 3073}, "scaled_dot"),
    (HOPPER, {"kind": "fp8", "group_cols": 3080, "k": 3080}, "scaled_dot"),
    (AMPERE, {"kind": "fp8", "group_cols": 3072}, "decode"),
    (AMPERE, {"kind": "fp8", "group_cols": 128, "m": 16}, "decode_dot"),
    (AMPERE, {"kind": "int8", "group_cols": 128}, "scaled_dot"),
    (ability(torch.device("cpu")), {}, "dequantize"),
], ids=str)
def test_the_kernel_follows_from_the_shape(able, changes, chosen):
    assert linear_path(dataclasses.replace(BASE, **changes), able) == chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="here for machines without a GPU: runs the GPU's route in Triton's interpreter")
@formats
@pytest.mark.parametrize("rows, dtype", [(2, torch.float16), (20, torch.float16), (70, torch.float16), (20, torch.float32)], ids=str)
def test_the_gpus_route_gives_the_cpus_answer(fmt, rows, dtype, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: pip install --no-deps triton")
    monkeypatch.setattr(maths, "ability", lambda device: dataclasses.replace(HOPPER, scaled_mm=False))
    register_layouts()
    generator = torch.Generator().manual_seed(0)
    shape = (128, 128)
    qt = tensor_of_layer(fmt, fmt.quantize(torch.randn(shape, generator=generator)), shape, dtype)
    x, bias = (torch.randn(s, generator=generator).to(dtype) for s in [(rows // 2, 2, 128), (128,)])
    with torch.inference_mode():
        got = linear(x, qt, bias)
    want = linear(x.float(), fmt.dequantize(maths._tensors(qt._qdata, qt._params), shape), bias.float())
    activations = 0.04 if fmt.element.bits == 8 and rows > 2 and dtype is not torch.float32 else 0.0
    assert got.dtype is dtype and float((got - want).norm() / want.norm()) < 1e-3 + activations
