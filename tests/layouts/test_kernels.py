"""Every Triton kernel against its torch specification: in Triton's interpreter on a CPU, compiled on a GPU."""

import pytest
import torch
from comfyui_quantpress.layouts.kernels.activation import quantize_activation, quantize_activation_spec
from comfyui_quantpress.layouts.kernels.decode import decode, decode_spec
from comfyui_quantpress.layouts.kernels.scaled_dot import scaled_dot, scaled_dot_spec, scaled_mm
from comfyui_quantpress.layouts.kernels.weight import Weight, decoded, geometry_of
from comfyui_quantpress.layouts.kernels.weight_only import decode_dot, decode_dot_spec, gemv, gemv_spec
from comfyui_quantpress.quant_core.formats import all_formats

pytest.importorskip("triton", reason="triton is not installed: pip install --no-deps triton")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CAPABILITY = torch.cuda.get_device_capability() if CUDA else (0, 0)
FORMATS = [fmt for fmt in all_formats() if fmt.runtime.kernel is not None]
EIGHT_BIT = [fmt for fmt in FORMATS if fmt.element.bits == 8]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# (M, N, K), dtype, bias. M and N are not multiples of any tile; K is one of the group only. The interpreter is slow:
# few there.
CASES = [
    ((1, 20, 384), torch.float32, False),
    ((3, 18, 256), torch.float16, True),
    ((19, 36, 128), torch.bfloat16, True),
]
if CUDA:
    CASES += [
        (shape, dtype, (index + shape[0]) % 2 == 0)
        for shape in [(1, 1000, 3072), (300, 1000, 3072), (77, 264, 1536), (16, 40, 128)]
        for index, dtype in enumerate(DTYPES)
    ]

formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
eight_bit = pytest.mark.parametrize("fmt", EIGHT_BIT, ids=lambda fmt: fmt.name)
cases = pytest.mark.parametrize("shape, dtype, with_bias", CASES, ids=str)
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


def weight_of(fmt, tensors, shape):
    return Weight(geometry_of(fmt, shape), tensors["weight"], tensors["weight_scale"], tensors.get("weight_codebook"))


def layer(fmt, n, k):
    """A quantized weight of at least [n, k], with rows and columns that differ in size, so a wrong scale shows."""
    if fmt.granularity.value == "block":
        n = -(-n // fmt.group_size) * fmt.group_size
    w = (
        random((n, k), seed=1)
        * torch.logspace(-2, 1, k, device=DEVICE)
        * torch.logspace(-1, 1, n, device=DEVICE)[:, None]
    )
    tensors = fmt.quantize(w)
    return weight_of(fmt, tensors, (n, k))


def inputs(m, k, dtype):
    return random((m, k), seed=2, dtype=dtype)


def bias_of(weight, dtype, wanted):
    return random((weight.geometry.shape[0],), seed=3, dtype=dtype) * 5 if wanted else None


def close(ours, spec, tolerance):
    """Relative Frobenius error; one rounding to the output dtype is allowed on top."""
    rounding = torch.finfo(ours.dtype).eps / 2
    error = (ours.double() - spec.double()).norm() / spec.double().norm()
    assert ours.shape == spec.shape and ours.dtype == spec.dtype
    assert error <= tolerance + rounding, f"{float(error):.2e} > {tolerance + rounding:.2e}"


@formats
def test_the_weight_specification_is_the_engine(fmt):
    w = random((256, 256), seed=4)
    tensors = fmt.quantize(w)
    weight = weight_of(fmt, tensors, (256, 256))
    assert torch.equal(decoded(weight), fmt.dequantize(tensors, (256, 256)))


@formats
@cases
def test_decode_equals_its_specification_bit_for_bit(fmt, shape, dtype, with_bias):
    weight = layer(fmt, shape[1], shape[2])
    assert torch.equal(decode(weight, dtype), decode_spec(weight, dtype))


def test_every_fp8_code_decodes_as_torch_does():
    fmt = next(fmt for fmt in FORMATS if fmt.name == "float8_e4m3fn_rowwise")
    codes = torch.arange(256, device=DEVICE).to(torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    weight = weight_of(fmt, {"weight": codes, "weight_scale": torch.ones(1, device=DEVICE)}, (1, 256))
    assert torch.equal(decode(weight, torch.float32).isnan(), codes.float().isnan())
    assert torch.equal(decode(weight, torch.float32).nan_to_num(), codes.float().nan_to_num())


@formats
@cases
def test_gemv_equals_its_specification(fmt, shape, dtype, with_bias):
    weight, x = layer(fmt, shape[1], shape[2]), inputs(min(shape[0], 16 if CUDA else 2), shape[2], dtype)
    bias = bias_of(weight, dtype, with_bias)
    close(gemv(x, weight, bias), gemv_spec(x, weight, bias), 1e-5)


@formats
@cases
def test_decode_dot_equals_its_specification(fmt, shape, dtype, with_bias):
    dtype = torch.float16 if dtype is torch.float32 else dtype
    weight, x = layer(fmt, shape[1], shape[2]), inputs(shape[0], shape[2], dtype)
    bias = bias_of(weight, dtype, with_bias)
    close(decode_dot(x, weight, bias), decode_dot_spec(x, weight, bias), 1e-4)


@pytest.mark.parametrize("code_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("group", [64, 128, 1000] + [3072, 12288] * CUDA)
@dtypes
def test_activation_codes_and_scales_equal_their_specification_byte_for_byte(code_dtype, group, dtype):
    if CUDA and code_dtype.is_floating_point and CAPABILITY < (8, 9):
        pytest.skip("fp8 conversion needs compute capability 8.9")
    x = inputs(7, group * 3, dtype) * torch.logspace(-3, 3, group * 3, device=DEVICE).to(dtype)
    x[3] = 0
    x[4, :group] = 1e-7
    codes, scale = quantize_activation(x, group, code_dtype)
    want_codes, want_scale = quantize_activation_spec(x, group, code_dtype)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_spoilt_activation_reaches_the_scale_and_spoils_no_other_row(bad):
    x = inputs(4, 128, torch.float32)
    x[2, 7] = bad
    _, scale = quantize_activation(x, 128, torch.int8)
    assert scale.isfinite().flatten().tolist() == [True, True, False, True]


@eight_bit
@cases
def test_scaled_dot_equals_its_specification(fmt, shape, dtype, with_bias):
    weight = layer(fmt, shape[1], shape[2])
    if CUDA and weight.geometry.kind == "fp8" and CAPABILITY < (8, 9):
        pytest.skip("fp8 matrix products need compute capability 8.9")
    codes, scale = quantize_activation_spec(
        inputs(shape[0], shape[2], torch.float32), weight.geometry.group_cols, weight.codes.dtype
    )
    bias = bias_of(weight, dtype, with_bias)
    close(scaled_dot(codes, scale, weight, bias, dtype), scaled_dot_spec(codes, scale, weight, bias, dtype), 2e-3)


@pytest.mark.skipif(CAPABILITY < (8, 9), reason="torch's row-wise scaled matmul needs a CUDA device of capability 8.9")
@pytest.mark.parametrize("with_bias", [False, True])
def test_scaled_mm_equals_the_scaled_dot_specification(with_bias):
    fmt = next(fmt for fmt in FORMATS if fmt.name == "float8_e4m3fn_rowwise")
    weight = layer(fmt, 1008, 3072)
    codes, scale = quantize_activation_spec(inputs(300, 3072, torch.float32), 3072, weight.codes.dtype)
    bias = bias_of(weight, torch.bfloat16, with_bias)
    close(
        scaled_mm(codes, scale, weight, bias, torch.bfloat16),
        scaled_dot_spec(codes, scale, weight, bias, torch.bfloat16),
        2e-3,
    )


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_group_size_of_a_codebook_format(group_size):
    fmt = next(fmt for fmt in FORMATS if fmt.name == "bnb_nf4").with_options(group_size=group_size)
    weight, x = layer(fmt, 24, 384), inputs(3, 384, torch.bfloat16)
    assert torch.equal(decode(weight, torch.bfloat16), decode_spec(weight, torch.bfloat16))
    close(gemv(x, weight, None), gemv_spec(x, weight, None), 1e-5)
    close(decode_dot(x, weight, None), decode_dot_spec(x, weight, None), 1e-4)


@eight_bit
def test_the_other_group_sizes_of_the_8_bit_formats(fmt):
    for group_size in fmt.group_sizes if CUDA else fmt.group_sizes[:1]:
        variant = fmt.with_options(group_size=group_size)
        weight, x = layer(variant, 12, 512), inputs(2, 512, torch.bfloat16)
        assert torch.equal(decode(weight, torch.float16), decode_spec(weight, torch.float16))
        close(gemv(x, weight, None), gemv_spec(x, weight, None), 1e-5)
        close(decode_dot(x, weight, None), decode_dot_spec(x, weight, None), 1e-4)
        if CUDA and weight.geometry.kind == "fp8" and CAPABILITY < (8, 9):
            continue
        codes, scale = quantize_activation_spec(x, group_size, weight.codes.dtype)
        close(
            scaled_dot(codes, scale, weight, None, x.dtype), scaled_dot_spec(codes, scale, weight, None, x.dtype), 2e-3
        )
