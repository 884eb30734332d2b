"""The failure of an older pack, "mat1 and mat2 to have the same dtype, but got: BFloat16 != unsigned char".

It means that the packed bytes themselves reached a matrix product. One test for each way there that lies in a layout.
"""

import ast
import dataclasses
from pathlib import Path

import comfy_kitchen.tensor
import comfy_kitchen.tensor.base
import comfyui_quantpress.layouts
import pytest
import torch
from comfyui_quantpress.layouts import layout_classes, register_layouts, tensor_of_layer
from comfyui_quantpress.quant_core.formats import all_formats
from torch.nn.functional import linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (256, 256)
FORMATS = [fmt for fmt in all_formats() if fmt.runtime.native_since is None]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
OPS = [
    torch.ops.aten.linear.default,
    torch.ops.aten.t.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
]
FOLDER = Path(comfyui_quantpress.layouts.__file__).parent

register_layouts()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On matrices this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer(fmt, dtype=torch.bfloat16):
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return tensor_of_layer(fmt, fmt.quantize(w), SHAPE, dtype)


def test_the_bytes_in_a_matrix_product_do_give_that_error():
    """What the others guard against is real: the failure itself, on the raw bytes."""
    qt = layer(next(fmt for fmt in FORMATS if fmt.name == "bnb_nf4"))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.ones(1, SHAPE[1] // 2, dtype=torch.bfloat16, device=DEVICE), qt._qdata)


@formats
def test_cause_1_the_storage_dtype_as_orig_dtype_is_refused(fmt):
    params = layer(fmt)._params
    for storage in (torch.uint8, torch.int8):
        with pytest.raises(TypeError, match="never that of the stored codes"):
            dataclasses.replace(params, orig_dtype=storage)
        with pytest.raises(TypeError, match="never that of the stored codes"):
            layer(fmt).to(storage)


@formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cause_2_dequantize_returns_floats_of_orig_dtype_not_codes(fmt, dtype):
    qt = layer(fmt, dtype)
    params = qt._params
    assert qt.layout_cls.dequantize(qt._qdata, params).dtype is params.orig_dtype is dtype
    assert qt.dequantize().abs().max() < 10  # values of a normal matrix, no indices up to 255
    for name in params._tensor_fields():  # a codebook or scale of bytes is refused when built
        with pytest.raises(TypeError, match=name):
            dataclasses.replace(params, **{name: getattr(params, name).to(torch.uint8)})


@formats
def test_cause_3_the_fallback_multiplies_the_dequantized_weight(fmt, monkeypatch):
    """Where the device has no kernel, what reaches torch's linear is a float [N, K] and never the stored codes."""
    from comfyui_quantpress.layouts import capability
    from comfyui_quantpress.layouts import linear as maths

    none = capability.Ability(triton=False, fp8_dot=False, scaled_mm=False, fast_16bit=False, reason="test")
    monkeypatch.setattr(maths, "ability", lambda device: none)
    seen = []
    monkeypatch.setattr(maths, "float_linear", lambda x, w, b: seen.append(w) or linear(x, w, b))
    with torch.inference_mode():
        linear(torch.ones(40, SHAPE[1], dtype=torch.bfloat16, device=DEVICE), layer(fmt))
    assert [(w.dtype, tuple(w.shape)) for w in seen] == [(torch.bfloat16, SHAPE)]


def test_cause_4_there_is_one_quantized_tensor_class():
    """Every module below layouts takes it from comfy_kitchen.tensor, and none imports comfy's by a bare name."""
    imported = set()
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported |= {(node.module, alias.name) for alias in node.names if alias.name == "QuantizedTensor"}
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"quant_ops", "ops", "utils"}, path
    assert imported == {("comfy_kitchen.tensor", "QuantizedTensor")}
    assert comfy_kitchen.tensor.QuantizedTensor is comfy_kitchen.tensor.base.QuantizedTensor


@formats
def test_cause_7_handlers_are_keyed_by_the_very_class_that_the_name_finds(fmt):
    layout = layout_classes()[fmt.runtime.layout]
    assert comfy_kitchen.tensor.get_layout_class(fmt.runtime.layout) is layout is layer(fmt).layout_cls
    for op in OPS:
        assert layout in comfy_kitchen.tensor.base._LAYOUT_DISPATCH_TABLE[op]


@formats
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_cause_8_linear_taken_apart_outside_inference_mode_stays_quantized_until_the_product(
    fmt, bias, rank, monkeypatch
):
    from comfyui_quantpress.layouts import torch_ops

    qt = layer(fmt)
    x = torch.ones(40, SHAPE[1], dtype=torch.bfloat16, device=DEVICE)
    x = x if rank == 2 else x.view(2, 20, -1)
    b = torch.ones(SHAPE[0], dtype=torch.bfloat16, device=DEVICE) if bias else None
    flipped = qt.t()
    assert type(flipped) is type(qt) and flipped._params.transposed and flipped._layout_cls == qt._layout_cls
    reached = []
    whole = torch_ops.linear
    monkeypatch.setattr(torch_ops, "linear", lambda *args: reached.append(args[0]) or whole(*args))
    with torch.no_grad():
        assert linear(x, qt, b).dtype is torch.bfloat16
    assert reached == [fmt.name]


@formats
def test_cause_9_parameters_and_data_stay_quantized(fmt):
    qt = layer(fmt)
    for wrapped in (
        torch.nn.Parameter(qt, requires_grad=False),
        torch.nn.Parameter(qt, requires_grad=False).data,
        qt.detach(),
    ):
        assert isinstance(wrapped, comfy_kitchen.tensor.QuantizedTensor)
        assert wrapped.dequantize().dtype is torch.bfloat16


@formats
def test_cause_11_the_flattened_parts_say_their_own_dtypes(fmt):
    """A cast buffer of the shown dtype over packed bytes is garbage: the parts carry storage dtypes and sizes."""
    qt = layer(fmt)
    names, context = qt.__tensor_flatten__()
    assert names[0] == "_qdata" and qt.nbytes == qt._qdata.nbytes
    assert set(context["tensor_fields"]) == set(qt._params._tensor_fields())
    assert all(type(getattr(qt, name)) is torch.Tensor for name in names)
