"""Our encoders against software that we did not write: comfy-kitchen's encoders and layouts, and bitsandbytes."""

from dataclasses import replace

import pytest
import torch
from comfy_kitchen.backends.eager import quantization as eager
from comfy_kitchen.backends.eager.convrot_w4a4 import quantize_convrot_w4a4_weight
from comfy_kitchen.backends.eager.w4a8_int8 import quantize_w4a8_int8_weight
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from comfyui_quantpress.quant_core.formats import get_format

SHAPES = [(256, 512), (96, 256), (33, 1024)]


def weight(shape, seed=0, heavy=False):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * 0.02
    if heavy:
        w = w * torch.randn(shape, generator=g).abs().pow(2)
        w[:, 3] *= 40
    return w


def same_bytes(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert torch.equal(
        ours.reshape(-1).contiguous().view(torch.uint8), theirs.reshape(-1).contiguous().view(torch.uint8)
    )


cases = pytest.mark.parametrize("shape", SHAPES, ids=str)
tails = pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy"])


@cases
@tails
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_per_tensor_equals_kitchen(name, shape, heavy):
    w = weight(shape, heavy=heavy)
    dtype = getattr(torch, name)
    scale = w.abs().amax() / torch.finfo(dtype).max
    ours = get_format(name).quantize(w)
    same_bytes(ours["weight_scale"], scale)
    same_bytes(ours["weight"], eager.quantize_per_tensor_fp8(w, scale, dtype))


@cases
@tails
def test_int8_per_tensor_and_per_row_equal_kitchen(shape, heavy):
    w = weight(shape, heavy=heavy)
    w[5] = 0
    for name, encode in [
        ("int8_tensorwise", eager.quantize_int8_tensorwise),
        ("int8_rowwise", eager.quantize_int8_rowwise),
    ]:
        q, scale = encode(w)
        ours = get_format(name).quantize(w)
        same_bytes(ours["weight"], q)
        same_bytes(ours["weight_scale"], scale)


@cases
@tails
@pytest.mark.parametrize("rotation", [16, 64, 256])
def test_int8_convrot_equals_kitchen(shape, heavy, rotation):
    w = weight(shape, heavy=heavy)
    q, scale = eager.quantize_int8_convrot_weight(w, rotation)
    ours = get_format("int8_convrot", rotation=rotation).quantize(w)
    same_bytes(ours["weight"], q)
    same_bytes(ours["weight_scale"], scale)


@tails
@pytest.mark.parametrize("shape", SHAPES + [(64, 24), (17, 40)], ids=str)
def test_nvfp4_equals_kitchen(shape, heavy):
    w = weight(shape, heavy=heavy)
    w[0, :16] = 0
    w[1, :16] = -1e-7  # a block whose scale rounds to zero
    w[2, 0] = -0.0
    parent = w.abs().amax() / (448 * 6)
    codes, scales = eager.quantize_nvfp4(w, parent, pad_16x=True)
    ours = get_format("nvfp4").quantize(w)
    same_bytes(ours["weight_scale_2"], parent)
    same_bytes(ours["weight_scale"], scales)
    same_bytes(ours["weight"], codes)


@tails
@pytest.mark.parametrize("shape", SHAPES + [(40, 72)], ids=str)
def test_mxfp8_equals_kitchen(shape, heavy):
    w = weight(shape, heavy=heavy)
    w[0, :32] = 0
    codes, scales = eager.quantize_mxfp8(w, pad_32x=True)
    ours = get_format("mxfp8").quantize(w)
    same_bytes(ours["weight"], codes)
    same_bytes(ours["weight_scale"], scales.view(torch.uint8))


@cases
@tails
@pytest.mark.parametrize("rotation", [16, 64, 256])
def test_convrot_w4a4_equals_kitchen(shape, heavy, rotation):
    w = weight(shape, heavy=heavy)
    w[7] = 0
    codes, scales = quantize_convrot_w4a4_weight(w, rotation)
    ours = get_format("convrot_w4a4", rotation=rotation).quantize(w)
    same_bytes(ours["weight"], codes)
    same_bytes(ours["weight_scale"], scales)


@cases
@pytest.mark.parametrize("rotation", [16, 256])
@pytest.mark.parametrize("kind", ["normal", "heavy", "fitted"])
def test_w4a8_equals_kitchen(shape, rotation, kind):
    w = weight(shape, heavy=kind == "heavy")
    if kind == "fitted":  # sparse spikes stay heavy-tailed after a small rotation
        w = torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.01, w * 100, w * 0.01)
    codes, s_rel, s_channel, correction, codebook = quantize_w4a8_int8_weight(w, 16, rotation)
    assert correction is None
    ours = replace(get_format("asym_w4a8_int8"), rotation=rotation).quantize(w)  # 16: files may hold it
    same_bytes(ours["weight_codebook"], codebook)
    same_bytes(ours["weight_s_channel"], s_channel)
    same_bytes(ours["weight_s_rel"], s_rel)
    same_bytes(ours["weight"], codes)


def kitchen_tensor(name, tensors, shape):
    """The layer as comfy-kitchen's own layout holds it."""
    fmt = get_format(name)
    layout = {"float8_e4m3fn": "TensorCoreFP8Layout", "float8_e5m2": "TensorCoreFP8Layout"}.get(
        name, fmt.runtime.layout
    )
    params = {"orig_dtype": torch.float32, "orig_shape": tuple(shape)}
    scale = tensors.get("weight_scale")
    if name == "nvfp4":
        params |= {"scale": tensors["weight_scale_2"], "block_scale": scale}
    elif name == "mxfp8":
        params |= {"scale": scale.view(torch.float8_e8m0fnu)}
    elif name == "asym_w4a8_int8":
        params |= {
            "scale": tensors["weight_s_rel"],
            "s_channel": tensors["weight_s_channel"],
            "codebook": tensors["weight_codebook"],
            "convrot_groupsize": fmt.rotation,
        }
    elif name == "awq_w4a16":
        params |= {"scale": scale, "zeros": tensors["weight_zeros"]}
    elif name == "convrot_w4a4":
        params |= {"scale": scale, "convrot_groupsize": fmt.rotation}
    elif name == "int8_convrot":
        params |= {"scale": scale, "convrot": True, "convrot_groupsize": fmt.rotation}
    else:
        params |= {"scale": scale}
    return QuantizedTensor(tensors["weight"], layout, get_layout_class(layout).Params(**params))


@pytest.mark.parametrize(
    "name",
    [
        "float8_e4m3fn",
        "float8_e5m2",
        "int8_tensorwise",
        "int8_rowwise",
        "int8_convrot",
        "nvfp4",
        "mxfp8",
        "convrot_w4a4",
        "asym_w4a8_int8",
        "awq_w4a16",
    ],
)
def test_kitchen_layouts_decode_our_tensors_to_our_values(name):
    shape = (96, 512)
    w = weight(shape)
    fmt = get_format(name)
    tensors = fmt.quantize(w)
    theirs = kitchen_tensor(name, tensors, shape).dequantize()
    ours = fmt.dequantize(tensors, shape)
    assert torch.allclose(theirs, ours, rtol=2e-5, atol=2e-6 * float(w.abs().max()))
    assert (ours - w).norm() / w.norm() < 0.2


bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install --no-deps bitsandbytes")


@cases
@tails
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_absmax_equal_bitsandbytes(shape, heavy, group_size, quant_type, dtype):
    w = weight(shape, heavy=heavy).to(dtype)
    w[0, :group_size] = 0
    packed, state = bnb.functional.quantize_4bit(w, blocksize=group_size, quant_type=quant_type)
    ours = get_format(f"bnb_{quant_type}", group_size=group_size).quantize(w)
    same_bytes(ours["weight_scale"].reshape(-1), state.absmax)
    same_bytes(ours["weight"].reshape(-1, 1), packed)
    same_bytes(ours["weight_codebook"], state.code.float())
    theirs = bnb.functional.dequantize_4bit(packed, state).float()
    fmt = get_format(f"bnb_{quant_type}", group_size=group_size)
    assert torch.equal(fmt.dequantize(ours, shape).to(dtype).float(), theirs)
