"""Our QuantizedTensor layouts: they keep bits and geometry, multiply in every mode, dequantize to the asked dtype."""

import dataclasses

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from comfyui_quantpress.layouts import layout_classes, register_layouts, tensor_of_layer
from comfyui_quantpress.quant_core.formats import all_formats
from torch.nn.functional import linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = [fmt for fmt in all_formats() if fmt.runtime.native_since is None]
NATIVE = [fmt for fmt in all_formats() if fmt.runtime.native_since is not None]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPE = (384, 256)  # multiples of every block, and not square

register_layouts()
ours = pytest.mark.parametrize("fmt", OURS, ids=lambda fmt: fmt.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
modes = pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On matrices this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def layer(fmt, dtype=torch.bfloat16, seed=0):
    tensors = fmt.quantize(random(SHAPE, seed) * 0.02)
    return tensors, tensor_of_layer(fmt, tensors, SHAPE, dtype)


def inner(qt):
    return qt.layout_cls.get_plain_tensors(qt)


def same_bits(a, b):
    assert type(a) is type(b) is QuantizedTensor and a._layout_cls == b._layout_cls
    assert len(inner(a)) == len(inner(b))
    for one, other in zip(inner(a), inner(b), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8))


def close(got, want, tolerance):
    assert got.shape == want.shape and got.dtype == want.dtype and type(got) is torch.Tensor
    assert float((got.double() - want.double()).norm() / want.double().norm()) < tolerance


# On CUDA the fp8 and int8 layouts also round the inputs: to 8 bits.
def tolerance(fmt, dtype):
    rounding = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    return rounding + (0.03 if DEVICE == "cuda" and fmt.element.bits == 8 and dtype is not torch.float32 else 0)


# --- registration ----------------------------------------------------------------------------------------------------


def test_there_is_one_layout_per_format_and_registering_again_changes_nothing():
    before = dict(layout_classes())
    assert set(before) == {fmt.runtime.layout for fmt in OURS}
    assert register_layouts() == before
    for name, cls in before.items():
        assert get_layout_class(name) is cls and cls.__name__ == name


@ours
def test_params_declare_exactly_their_tensor_fields(fmt):
    _, qt = layer(fmt)
    params = qt._params
    tensors = [f.name for f in dataclasses.fields(params) if isinstance(getattr(params, f.name), torch.Tensor)]
    assert sorted(tensors) == sorted(params._tensor_fields())
    assert all(getattr(params, name).is_contiguous() for name in tensors)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.orig_dtype = torch.float32


@ours
def test_state_dict_names_are_those_on_disk(fmt):
    tensors, qt = layer(fmt)
    stored = qt.state_dict("layer.weight")
    runtime = {f"layer.{name}": tensor for name, tensor in tensors.items() if name != "input_scale"}
    assert set(stored) == set(runtime)
    for name, tensor in runtime.items():
        assert (
            torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8))
            and stored[name].shape == tensor.shape
        )


@ours
def test_the_logical_shape_is_known_from_the_storage(fmt):
    _, qt = layer(fmt)
    assert tuple(qt.shape) == tuple(qt.padded_shape) == SHAPE and not qt.is_padded


# --- dequantizing ----------------------------------------------------------------------------------------------------


@ours
@dtypes
def test_dequantize_gives_the_engines_values_in_the_wanted_dtype(fmt, dtype):
    tensors, qt = layer(fmt, dtype)
    assert qt.dtype == dtype
    assert torch.equal(qt.dequantize(), fmt.dequantize(tensors, SHAPE).to(dtype))


@pytest.mark.parametrize("fmt", NATIVE, ids=lambda fmt: fmt.name)
def test_native_formats_run_in_comfy_kitchens_layouts(fmt):
    tensors, qt = layer(fmt, torch.float32)
    want = fmt.dequantize(tensors, SHAPE)
    assert torch.allclose(qt.dequantize(), want, rtol=2e-5, atol=2e-6 * float(want.abs().max()))


@ours
def test_another_group_size_of_a_file_is_honoured(fmt):
    for group_size in fmt.group_sizes:
        variant = fmt.with_options(group_size=group_size)
        tensors = variant.quantize(random((256, 512)))
        qt = tensor_of_layer(variant, tensors, (256, 512), torch.float32)
        assert torch.equal(qt.dequantize(), variant.dequantize(tensors, (256, 512)))
        again = qt.requantize_from_float(qt.dequantize(), scale=qt._params.scale)
        assert again._params.group_size == group_size
        assert torch.equal(again.dequantize(), qt.dequantize())  # not the bits: FP4 has two codes for zero


# --- multiplying -----------------------------------------------------------------------------------------------------


@ours
@dtypes
@modes
def test_linear_equals_the_dequantized_weight_in_every_mode_and_rank(fmt, dtype, mode):
    _, qt = layer(fmt, dtype)
    bias = random((SHAPE[0],), 3, dtype)
    with mode():
        for leading in [(), (1,), (40,), (2, 17), (2, 3, 5)]:
            x = random((*leading, SHAPE[1]), 2, dtype)
            for b in (None, bias):
                close(linear(x, qt, b), linear(x, qt.dequantize(), b), tolerance(fmt, dtype))


@ours
def test_a_module_holds_the_weight_as_a_parameter(fmt):
    _, qt = layer(fmt, torch.float32)
    module = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False, device="meta")
    module.weight = torch.nn.Parameter(qt, requires_grad=False)
    x = random((40, SHAPE[1]), 2)
    with torch.no_grad():
        close(module(x), linear(x, qt.dequantize()), 1e-5)


@ours
def test_no_rows_give_no_rows(fmt):
    _, qt = layer(fmt)
    assert linear(random((0, SHAPE[1]), 1, torch.bfloat16), qt).shape == (0, SHAPE[0])


@ours
def test_the_output_has_the_inputs_dtype_whatever_the_weight_shows(fmt):
    _, qt = layer(fmt, torch.bfloat16)
    with torch.inference_mode():
        x = random((40, SHAPE[1]), 2, torch.float16)
        bias = random((SHAPE[0],), 3, torch.bfloat16)
        close(
            linear(x, qt, bias),
            linear(x, qt.to(torch.float16).dequantize(), bias.half()),
            tolerance(fmt, torch.float16),
        )


@ours
def test_mm_and_addmm_with_either_way_round(fmt):
    _, qt = layer(fmt, torch.float32)
    w = qt.dequantize()
    x, back, bias = random((40, SHAPE[1]), 2), random((40, SHAPE[0]), 3), random((SHAPE[0],), 4)
    with torch.no_grad():
        assert (
            qt.t().shape == SHAPE[::-1]
            and torch.equal(qt.t().dequantize(), w.t())
            and torch.equal(qt.t().t().dequantize(), w)
        )
        close(torch.mm(x, qt.t()), x @ w.t(), 1e-5)
        close(torch.mm(back, qt), back @ w, 1e-5)
        close(torch.mm(qt, x.t()), w @ x.t(), 1e-5)
        close(torch.addmm(bias, x, qt.t()), torch.addmm(bias, x, w.t()), 1e-5)
        close(torch.addmm(bias, x, qt.t(), beta=0.5, alpha=2), torch.addmm(bias, x, w.t(), beta=0.5, alpha=2), 1e-5)
        close(torch.addmm(bias * float("nan"), x, qt.t(), beta=0), x @ w.t(), 1e-5)
        close(torch.addmm(bias[:1], x, qt.t()), torch.addmm(bias[:1], x, w.t()), 1e-5)


@ours
def test_a_transposed_weight_and_a_quantized_input_are_dequantized(fmt):
    _, qt = layer(fmt, torch.float32)
    x = random((40, SHAPE[0]), 2)
    with torch.inference_mode():
        close(linear(x, qt.t()), linear(x, qt.dequantize().t()), 1e-5)
        close(linear(qt, qt), linear(qt.dequantize(), qt.dequantize()), 1e-5)


@ours
def test_gradients_flow_to_the_input(fmt):
    _, qt = layer(fmt, torch.float32)
    x = random((40, SHAPE[1]), 2).requires_grad_()
    linear(x, qt).square().sum().backward()
    w = qt.dequantize()
    close(x.grad, 2 * (x.detach() @ w.t()) @ w, 1e-5)


@ours
def test_other_operations_see_the_dequantized_weight(fmt):
    _, qt = layer(fmt, torch.float32)
    w = qt.dequantize()
    assert torch.equal(qt[3:5], w[3:5]) and torch.equal(qt.view(-1), w.view(-1))
    assert torch.equal(qt + 1, w + 1) and torch.equal(torch.cat([qt, qt]), torch.cat([w, w]))


@ours
def test_a_wrong_input_gets_torchs_own_error(fmt):
    _, qt = layer(fmt)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(random((40, SHAPE[1] + 1), 1, torch.bfloat16), qt)


# --- moving ----------------------------------------------------------------------------------------------------------


@ours
def test_copies_and_casts_keep_the_bits(fmt):
    _, qt = layer(fmt)
    copy = qt.clone()
    same_bits(copy, qt)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(inner(copy), inner(qt), strict=True))
    for moved in (qt.to(torch.float16), qt.to(DEVICE, torch.float32), qt.detach(), qt.to("cpu"), qt.contiguous()):
        same_bits(moved, qt)
    assert qt.to(torch.float16).dequantize().dtype is torch.float16
    empty = torch.empty_like(qt)
    empty.copy_(qt)
    same_bits(empty, qt)


@ours
def test_copy_takes_the_values_and_keeps_the_shown_dtype(fmt):
    _, qt = layer(fmt)
    _, other = layer(fmt, torch.float16, seed=9)
    qt.copy_(other)
    same_bits(qt, other)
    assert qt.dtype is torch.bfloat16 and qt.dequantize().dtype is torch.bfloat16


@ours
def test_flatten_and_unflatten_keep_the_bits(fmt):
    _, qt = layer(fmt)
    names, context = qt.__tensor_flatten__()
    parts = {name: getattr(qt, name) for name in names}
    same_bits(QuantizedTensor.__tensor_unflatten__(parts, context, None, None), qt)


@ours
def test_a_trip_through_one_byte_buffer_keeps_the_bits(fmt):
    """As ComfyUI offloads: every inner tensor is copied into one buffer, at a multiple of 1024, and viewed there."""
    _, qt = layer(fmt)
    names, context = qt.__tensor_flatten__()
    parts = [getattr(qt, name) for name in names]
    sizes = [-(-part.nbytes // 1024) * 1024 for part in parts]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=DEVICE)
    views, offset = {}, 0
    for name, part, size in zip(names, parts, sizes, strict=True):
        views[name] = buffer[offset : offset + part.nbytes].view(part.dtype).view(part.shape)
        views[name].copy_(part)
        offset += size
    moved = QuantizedTensor.__tensor_unflatten__(views, context, None, None)
    same_bits(moved, qt)
    start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    assert all(start <= tensor.data_ptr() < end for tensor in inner(moved))  # nothing was copied out of the buffer
    with torch.inference_mode():
        x = random((40, SHAPE[1]), 2, torch.bfloat16)
        assert torch.equal(linear(x, moved), linear(x, qt))
