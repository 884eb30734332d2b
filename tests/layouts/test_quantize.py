"""Quantizing through our layouts, as comfy does when it bakes a LoRA in: same geometry, unbiased, the seed decides."""

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfyui_quantpress.layouts import register_layouts, tensor_of_layer
from comfyui_quantpress.quant_core.errors import RequestError
from comfyui_quantpress.quant_core.formats import all_formats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = [fmt for fmt in all_formats() if fmt.runtime.native_since is None]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPE = (384, 256)  # multiples of every block, and not square

register_layouts()
ours = pytest.mark.parametrize("fmt", OURS, ids=lambda fmt: fmt.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


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


@ours
@dtypes
def test_from_float_writes_what_the_engine_writes(fmt, dtype):
    w = random(SHAPE, dtype=dtype)
    qt = QuantizedTensor.from_float(w, fmt.runtime.layout)
    same_bits(qt, tensor_of_layer(fmt, fmt.quantize(w), SHAPE, dtype))
    assert qt.dtype is dtype


@ours
@pytest.mark.parametrize("seed", [None, 0, 1, 2**32 - 1])
def test_requantizing_keeps_the_geometry_and_leaves_the_input_alone(fmt, seed):
    _, qt = layer(fmt)
    w = qt.dequantize() * 1.01
    before = w.clone()
    again = qt.requantize_from_float(w, scale="recalculate", stochastic_rounding=seed, inplace_ops=True)
    assert torch.equal(w, before)
    assert again.dtype is qt.dtype and again.shape == qt.shape
    assert [(t.dtype, t.shape) for t in inner(again)] == [(t.dtype, t.shape) for t in inner(qt)]
    qt.copy_(again)
    same_bits(qt, again)


@ours
def test_a_given_scale_is_used(fmt):
    _, qt = layer(fmt)
    scale = qt._params.scale
    again = qt.requantize_from_float(qt.dequantize(), scale=scale * 2)
    assert torch.equal(again._params.scale, scale * 2)
    one = qt.requantize_from_float(qt.dequantize(), scale=0.5)
    assert one._params.scale.shape == scale.shape and bool((one._params.scale == 0.5).all())
    with pytest.raises(RequestError, match="needs one value"):
        qt.requantize_from_float(qt.dequantize(), scale=torch.ones(7))


@ours
def test_stochastic_rounding_repeats_with_its_seed_and_picks_a_neighbour(fmt):
    w = random(SHAPE)
    draw = [QuantizedTensor.from_float(w, fmt.runtime.layout, stochastic_rounding=seed) for seed in (7, 7, 8)]
    same_bits(draw[0], draw[1])
    assert not torch.equal(draw[0]._qdata.view(torch.uint8), draw[2]._qdata.view(torch.uint8))
    qp = fmt.absmax(fmt.prepare(w))
    lo, hi = fmt.bracket_columns(w, qp, 0, SHAPE)
    got = draw[0].dequantize()
    slack = 1e-6 * w.abs().max()
    assert bool(((got - lo).abs() <= slack).logical_or((got - hi).abs() <= slack).all())


@ours
def test_the_mean_over_seeds_is_the_weight(fmt):
    shape, seeds = (128, 128), 100
    w = random(shape, 5) * 0.02
    qp = fmt.absmax(fmt.prepare(w))
    lo, hi = fmt.bracket_columns(w, qp, 0, shape)
    total = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    for seed in range(1, seeds + 1):
        total += QuantizedTensor.from_float(w, fmt.runtime.layout, stochastic_rounding=seed).dequantize()
    # The sum of a Bernoulli draw over the gap: its standard error, weight by weight, then over the whole matrix.
    spread = (((w - lo) * (hi - w)).clamp(min=0) / seeds).sqrt().double()
    error = total / seeds - w
    assert float(error.norm() / spread.norm()) < 1.05
    assert abs(float(error.sum())) < 5 * float(spread.norm())
    nearest = QuantizedTensor.from_float(w, fmt.runtime.layout).dequantize() - w
    assert float(error.norm()) < 0.2 * float(nearest.norm())


@ours
def test_a_small_lora_delta_survives_requantization(fmt):
    _, qt = layer(fmt, torch.float32)
    w = qt.dequantize()
    a, b = random((SHAPE[0], 1), 11), random((1, SHAPE[1]), 12)
    delta = a @ b
    delta *= 0.01 * w.norm() / delta.norm()  # far below one step of every grid
    moved = torch.zeros_like(w)
    for seed in range(1, 21):
        moved += qt.requantize_from_float(w + delta, scale="recalculate", stochastic_rounding=seed).dequantize() - w
    gain = float((moved / 20 * delta).sum() / delta.square().sum())
    assert 0.8 < gain < 1.2


@ours
def test_a_shape_that_does_not_fit_is_refused_with_a_reason(fmt):
    bad = random((250, 251)) if fmt.group_size else random((3, 4, 5))
    with pytest.raises(RequestError, match="Leave the layer unquantized"):
        QuantizedTensor.from_float(bad, fmt.runtime.layout)


def test_a_codebook_from_a_file_is_used_and_kept():
    fmt = next(fmt for fmt in OURS if fmt.name == "bnb_nf4")
    tensors = fmt.quantize(random(SHAPE))
    tensors["weight_codebook"] = tensors["weight_codebook"] * 0.9 + 0.01
    qt = tensor_of_layer(fmt, tensors, SHAPE, torch.float32)
    assert torch.equal(qt.dequantize(), fmt.dequantize(tensors, SHAPE))
    again = qt.requantize_from_float(qt.dequantize(), scale=qt._params.scale)
    same_bits(again, qt)
