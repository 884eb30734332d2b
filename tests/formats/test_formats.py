"""Properties of every registered format: a new one is tested by existing."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_quantpress.quant_core.errors import RequestError
from comfyui_quantpress.quant_core.formats import all_formats, format_of_layer, get_format
from comfyui_quantpress.quant_core.formats.records import KernelLimits
from comfyui_quantpress.quant_core.formats.slices import can_stream, quantize_streamed
from comfyui_quantpress.quant_core.numerics.elements import E2M1, E4M3, E5M2, FP4, INT4, INT8, NF4
from comfyui_quantpress.quant_core.numerics.packing import (
    pack_nibbles,
    sign_extend_nibbles,
    swizzle_scales,
    unpack_nibbles,
    unswizzle_scales,
)
from comfyui_quantpress.quant_core.numerics.ranks import rank_table
from comfyui_quantpress.quant_core.numerics.scale_dtypes import (
    SCALE_BF16,
    SCALE_E4M3,
    SCALE_E8M0,
    SCALE_F32,
    decode_e8m0,
    encode_e8m0,
)
from comfyui_quantpress.quant_core.numerics.scales import block_absmax, block_view
from hypothesis import given, settings
from hypothesis import strategies as st

FORMATS = all_formats()
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)


def normal(shape, seed=0, scale=0.02):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@every_format
def test_written_tensors_are_the_planned_ones(fmt):
    for shape in [(256, 512), (256, 1024)]:
        tensors = fmt.quantize(normal(shape))
        planned = {s.suffix: (s.dtype, s.shape, s.nbytes) for s in fmt.tensor_specs(shape)}
        assert {k: (t.dtype, tuple(t.shape), t.nbytes) for k, t in tensors.items()} == planned
        assert all(t.is_contiguous() for t in tensors.values())


@every_format
def test_the_smallest_shape_is_taken_and_no_smaller_one(fmt):
    rows, cols = shape = fmt.smallest_shape
    assert fmt.misfit(shape) is None
    assert tuple(fmt.quantize(normal(shape))) == fmt.suffixes
    exact = replace(fmt, rotations=())  # a smaller rotation group would fit a smaller weight
    for smaller in {(rows - 1, cols), (rows, cols - 1)}:
        assert exact.misfit(smaller) is not None


@every_format
def test_error_stays_within_the_stated_bound(fmt):
    for seed, power in [(0, 1), (1, 3)]:
        w = normal((256, 512), seed)
        w = w.abs().pow(power) * w.sign()
        work = fmt.prepare(w)
        qp = fmt.absmax(work)
        error = (fmt.round(work, qp) - work).abs()
        block = fmt.block(tuple(work.shape))
        largest = block_absmax(work, block)[:, None, :, None].expand(block_view(work, block).shape).reshape(work.shape)
        assert bool((error <= fmt.error_bound * largest + fmt.tensor_bound * work.abs().max()).all())


@every_format
def test_the_error_bound_is_not_slack(fmt):
    """A bound that nothing comes near would test nothing."""
    w = normal((256, 512), 3)
    work = fmt.prepare(w)
    error = (fmt.round(work, fmt.absmax(work)) - work).abs()
    block = fmt.block(tuple(work.shape))
    largest = block_absmax(work, block)[:, None, :, None].expand(block_view(work, block).shape).reshape(work.shape)
    assert float((error / largest).max()) > 0.3 * fmt.error_bound


@every_format
def test_the_sliced_error_is_the_whole_error(fmt):
    work = fmt.prepare(normal((768, 1024), 4))  # several slices
    qp = fmt.absmax(work)
    codes = fmt.encode(work, qp)
    decoded = fmt.decode(codes, qp)
    assert fmt.decoding_error(work, codes, qp) == pytest.approx(float((decoded - work).norm() / work.norm()), rel=1e-5)
    assert fmt.decoding_error(torch.zeros_like(work), codes, qp) == float("inf")


@every_format
def test_the_error_of_a_single_row_of_blocks_is_measured_too(fmt):
    """Its rows share their scales, and are more than one slice of the weights."""
    rows = max(fmt.block_rows, 32)
    work = fmt.prepare(normal((rows, 16384), 4))
    qp = fmt.absmax(work)
    codes = fmt.encode(work, qp)
    decoded = fmt.decode(codes, qp)
    assert fmt.decoding_error(work, codes, qp) == pytest.approx(float((decoded - work).norm() / work.norm()), rel=1e-5)


@every_format
@pytest.mark.parametrize("shape", [(1100, 2048), (4096, 1024)], ids=str)
def test_row_slices_give_the_bytes_of_the_whole(fmt, shape):
    if fmt.problem(shape) or not fmt.rows_are_independent:
        shape = (4096, 1024)
    w = normal(shape, 12).bfloat16()
    w[300:600] *= 30
    if not fmt.rows_are_independent:
        assert not can_stream(fmt, w)
        return
    assert can_stream(fmt, w)
    tensors, error = quantize_streamed(fmt, w)
    whole = fmt.quantize(w)
    assert tensors.keys() == whole.keys()
    for name, tensor in whole.items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape, name
        same = tensors[name].reshape(-1).view(torch.uint8) == tensor.reshape(-1).view(torch.uint8)
        # A rotation is a matrix product, whose last bit may depend on the number of rows.
        assert float(same.float().mean()) > 0.9999 if fmt.rotation else bool(same.all()), name
    work = fmt.prepare(w.float())
    assert error == pytest.approx(
        fmt.decoding_error(work, fmt.encode(work, fmt.absmax(work)), fmt.absmax(work)), rel=1e-3
    )  # float32 sums


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device to compare with the CPU")
@every_format
def test_cuda_gives_the_bytes_of_the_cpu(fmt):
    for seed in range(4):
        w = normal((512, 1024), seed)
        ours, theirs = fmt.quantize(w), {name: t.cpu() for name, t in fmt.quantize(w.cuda()).items()}
        if fmt.rotation is None:
            for name, tensor in ours.items():
                assert torch.equal(tensor.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8)), (
                    name
                )
        else:  # a matrix product sums in another order: some weights take the neighbouring code
            one, other = fmt.dequantize(ours, (512, 1024)), fmt.dequantize(theirs, (512, 1024))
            assert float((one - other).norm() / one.norm()) < 0.01


@every_format
def test_decoded_weights_keep_their_codes(fmt):
    work = fmt.prepare(normal((256, 512), 5))
    qp = fmt.absmax(work)
    codes = fmt.encode(work, qp)
    decoded = fmt.decode(codes, qp)
    again = fmt.decode(fmt.encode(decoded, qp), qp)
    assert torch.equal(decoded, again)


@every_format
def test_columns_round_and_bracket_like_the_whole(fmt):
    work = fmt.prepare(normal((256, 512), 6))
    qp, shape = fmt.absmax(work), tuple(work.shape)
    whole = fmt.round(work, qp)
    for start, stop in [(0, 7), (60, 130), (511, 512)]:
        columns = work[:, start:stop]
        assert torch.equal(fmt.round_columns(columns, qp, start, shape), whole[:, start:stop])
        lo, hi = fmt.bracket_columns(columns, qp, start, shape)
        nearest = whole[:, start:stop]
        assert bool(((nearest == lo) | (nearest == hi)).all())
        assert bool((lo <= hi).all())
        inside = (columns >= lo) & (columns <= hi)
        assert inside.float().mean() > 0.94  # the rest lies beyond the grid's ends


@every_format
def test_disk_round_trip_and_recognition(fmt):
    shape = (256, 512)
    w = normal(shape, 7)
    tensors = fmt.quantize(w)
    config = json.loads(json.dumps(fmt.config(shape, torch.bfloat16)))
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    read = format_of_layer("layer", config, shapes)
    assert read == fmt
    assert read.shape_from(shapes, config) == shape
    work = fmt.prepare(w)
    expected = fmt.restore(fmt.round(work, fmt.absmax(work)), shape)
    assert torch.equal(read.dequantize(tensors, shape), expected)


@every_format
def test_every_option_round_trips(fmt):
    for group in fmt.group_sizes:
        for rotation in fmt.rotations or (None,):
            variant = fmt.with_options(group, rotation)
            shape = (512, 1024)
            w = normal(shape, 8)
            tensors = variant.quantize(w)
            shapes = {k: tuple(t.shape) for k, t in tensors.items()}
            assert format_of_layer("x", variant.config(shape, torch.float32), shapes) == variant
            assert float((variant.dequantize(tensors, shape) - w).norm() / w.norm()) < 0.25


@every_format
def test_unknown_options_are_refused(fmt):
    with pytest.raises(RequestError, match="group_size 7 is not offered"):
        fmt.with_options(group_size=7)
    with pytest.raises(RequestError, match="rotation 5 is not offered"):
        fmt.with_options(rotation=5)


@every_format
def test_zero_tiny_and_huge_weights_stay_finite(fmt):
    shape = (256, 512)
    base = normal(shape, 9)
    for w in (
        torch.zeros(shape),
        base * 1e-37,
        base * 1e-44,
        base * 1e36,
        torch.full(shape, 3e38),
        -torch.zeros(shape),
    ):
        tensors = fmt.quantize(w)
        decoded = fmt.dequantize(tensors, shape)
        assert bool(torch.isfinite(decoded).all()), f"{fmt.name}: {float(w.abs().max())}"
        for name, t in tensors.items():
            if t.dtype.is_floating_point:
                assert bool(torch.isfinite(t.float()).all()), name
    assert float(fmt.dequantize(fmt.quantize(torch.zeros(shape)), shape).abs().max()) <= 1e-8


@every_format
def test_an_outlier_and_a_zero_block_do_not_spoil_the_rest(fmt):
    w = normal((256, 512), 10)
    w[:128] = 0
    w[200, 300] = 50.0
    decoded = fmt.dequantize(fmt.quantize(w), (256, 512))
    assert bool(torch.isfinite(decoded).all())
    bound = (fmt.error_bound + fmt.tensor_bound) * 50.0 * (16 if fmt.rotation else 1)
    assert float((decoded - w).abs().max()) <= bound


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_is_refused_with_a_reason_or_round_trips(data):
    fmt = data.draw(st.sampled_from(FORMATS))
    shape = (data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300)))
    problem = fmt.misfit(shape)
    if problem:
        assert fmt.name in problem
        return
    variant = fmt.for_shape(shape)
    w = normal(shape, data.draw(st.integers(0, 9)))
    tensors = variant.quantize(w)
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {s.suffix: s.shape for s in variant.tensor_specs(shape)}
    decoded = variant.dequantize(tensors, shape)
    assert decoded.shape == w.shape
    assert float((decoded - w).norm()) <= 0.4 * float(w.norm())


def test_shapes_no_format_takes():
    for fmt in FORMATS:
        assert fmt.problem((4,)) and fmt.problem((2, 3, 4)) and fmt.problem((0, 64))


def test_rotation_falls_back_to_the_largest_group_that_divides():
    fmt = get_format("int8_convrot")
    assert fmt.for_shape((64, 192)).rotation == 64
    assert fmt.for_shape((64, 768)).rotation == 256
    assert fmt.problem((64, 200)) == "in_features=200 is not a multiple of rotation group 256 (int8_convrot)"


@every_format
def test_nothing_is_offered_that_the_kernels_refuse(fmt):
    for rotation in fmt.rotations:
        variant = replace(fmt, rotation=rotation)
        assert variant.refused_by_kernels((128, 8 * variant.smallest_shape[1])) is None
    for size in fmt.group_sizes:
        assert replace(fmt, group_size=size).refused_by_kernels((256, 1024)) is None
    for k in (320, 640, 1152, 1408, 1920, 3360):
        for n in (320, 72, 8, 3, 1):
            if fmt.problem((n, k)) is None:
                stored = fmt.for_shape((n, k))
                assert stored.refused_by_kernels((n, k), stored.config((n, k), torch.bfloat16)) is None


@pytest.mark.parametrize("k", [320, 640, 1152, 1408, 1920, 3360])
def test_w4a8_is_not_rotated_by_less_than_its_kernels_rotate_by(k):
    fmt = get_format("asym_w4a8_int8")
    assert fmt.problem((64, k - k % 256)) is None
    reason = fmt.problem((64, k))
    assert (reason is None) == (k % 256 == 0)
    assert k % 256 == 0 or reason == f"in_features={k} is not a multiple of rotation group 256 (asym_w4a8_int8)"


def test_the_limits_of_kernels_count_beside_those_of_the_format():
    fmt = get_format("int8_rowwise")
    limits = KernelLimits(n_multiple=4, k_multiple=16)
    fmt = replace(fmt, runtime=replace(fmt.runtime, limits=limits))
    assert fmt.problem((8, 32)) is None
    assert fmt.problem((6, 32)) == (
        "out_features=6 is not a multiple of 4, as the GPU kernels that run int8_rowwise need"
    )
    assert "in_features=24 is not a multiple of 16" in fmt.problem((8, 24))
    assert "[8]" in fmt.problem((8,))


@pytest.mark.parametrize(
    ("name", "refused", "taken"),
    [  # as bench/results/odd_k_h200.jsonl has them
        ("float8_e4m3fn", [(72, 320), (3, 1024), (1000, 640), (320, 102)], (320, 640)),
        ("float8_e5m2", [(72, 320), (3, 1024), (1000, 640), (320, 102)], (320, 640)),
        ("nvfp4", [(72, 320), (3, 1024), (1, 102)], (320, 102)),
        ("mxfp8", [(72, 320), (3, 1024), (48, 1024)], (320, 102)),
        ("int8_tensorwise", [(320, 102), (1000, 85), (72, 90)], (3, 100)),
        ("int8_rowwise", [(320, 102), (1000, 85), (72, 90)], (3, 100)),
        ("int8_convrot", [], (3, 640)),
        ("convrot_w4a4", [], (3, 640)),
    ],
)
def test_what_the_kernels_of_a_gpu_refused_is_not_written_or_is_decoded(name, refused, taken):
    fmt = get_format(name)
    assert fmt.problem(taken) is None
    assert "full_precision_matrix_mult" not in fmt.config(taken, torch.bfloat16)
    for shape in refused:
        assert "as the GPU kernels that run" in fmt.refused_by_kernels(shape)
        if fmt.runtime.limits.of_quantized_inputs:  # then ComfyUI is told to decode the weight
            assert fmt.problem(shape) is None and fmt.config(shape, torch.bfloat16)["full_precision_matrix_mult"]
        else:
            assert "as the GPU kernels that run" in fmt.problem(shape)


@pytest.mark.parametrize("size", [32, 128])
def test_awq_of_other_groups_is_read_and_not_written(size):
    """comfy-kitchen's kernel for 9 to 256 rows multiplies with the scales of groups of 64."""
    fmt = get_format("awq_w4a16")
    with pytest.raises(RequestError, match="not offered by awq_w4a16. Choose one of 64"):
        fmt.with_options(group_size=size)
    stored = replace(fmt, group_size=size)
    w = normal((8, 256))
    assert stored.dequantize(stored.quantize(w), (8, 256)).shape == w.shape
    assert f"group_size is {size}" in stored.refused_by_kernels((8, 256))


def test_unknown_format_lists_the_known_ones():
    with pytest.raises(RequestError, match="bnb_nf4"):
        get_format("nf5")
    with pytest.raises(RequestError, match="layer.3: the format 'q4_k' is unknown"):
        format_of_layer("layer.3", {"format": "q4_k"}, {"weight": (4, 4)})


# ---- element grids --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [SCALE_F32, SCALE_BF16, SCALE_E4M3, SCALE_E8M0], ids=lambda d: str(d.dtype))
def test_a_scale_moves_to_the_next_that_its_dtype_holds(dtype):
    scale = dtype.snap(torch.tensor([2.0**-5, 0.75, 1.0, 3.3, 250.0]))
    assert torch.equal(dtype.load(dtype.store(scale)), scale) and torch.equal(dtype.snap(scale), scale)
    above, below = dtype.neighbour(scale, 1), dtype.neighbour(scale, -1)
    assert bool((below < scale).all()) and bool((scale < above).all())
    assert torch.equal(dtype.neighbour(above, -1), scale)
    for near in (above, below):
        assert torch.equal(dtype.snap(near), near)
        assert torch.equal(dtype.snap(scale + (near - scale) * 1e-9), scale)  # nothing lies between them
    ends = dtype.neighbour(torch.tensor([0.0, float(dtype.snap(torch.tensor(400.0)))]), 1000)
    assert float(ends[0]) == 0 and bool(torch.isfinite(ends).all())


ELEMENTS = [E4M3, E5M2, E2M1, INT8, INT4, NF4, FP4, get_format("bnb_af4").element]


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_every_grid_value_survives_and_every_code_decodes_to_the_grid(element):
    grid = element.values()
    assert bool((grid[1:] > grid[:-1]).all())
    assert torch.equal(element.round(grid), grid)
    assert float(grid.abs().max()) == element.max
    codes = element.encode(grid)
    assert codes.dtype == element.dtype and torch.equal(element.decode(codes), grid)


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_rounding_is_to_nearest_and_brackets_enclose(element):
    x = torch.cat([normal((4000,), 1, element.max / 3), element.values(), torch.tensor([1e9, -1e9, 0.0, 1e-20])])
    grid, near = element.values(), element.round(x)
    best = (x[:, None] - grid).abs().amin(dim=1)
    assert torch.allclose((x - near).abs(), best, rtol=1e-6, atol=0)
    lo, hi = element.bracket(x)
    inside = x.clamp(float(grid[0]), float(grid[-1]))
    assert bool((lo <= inside).all()) and bool((inside <= hi).all())
    assert bool(torch.isin(lo, grid).all()) and bool(torch.isin(hi, grid).all())
    index = torch.searchsorted(grid, hi.contiguous()) - torch.searchsorted(grid, lo.contiguous())
    assert int(index.max()) == 1 and torch.equal(index == 0, torch.isin(inside, grid))


def test_fp8_saturates_whatever_the_cast_of_this_torch_does():
    assert float(E4M3.round(torch.tensor(500.0))) == 448.0
    assert float(E5M2.round(torch.tensor(-1e6))) == -57344.0


def test_e2m1_named_corner_cases():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.1, -0.0, 0.0, -5.1])
    assert E2M1.encode(x).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 8, 8, 0, 15]


def test_e8m0_rounds_up_and_keeps_powers_of_two():
    x = torch.tensor([1.0, 1.0001, 0.75, 2.0**-126, 0.0, 3e38])
    assert encode_e8m0(x).tolist() == [127, 128, 127, 1, 0, 254]
    assert decode_e8m0(encode_e8m0(x)).tolist()[:4] == [1.0, 2.0, 1.0, 2.0**-126]


@settings(max_examples=50, deadline=None)
@given(
    bounds=st.lists(st.integers(-4000, 4000).map(lambda i: i / 4096), min_size=2, max_size=16, unique=True),
    seed=st.integers(0, 99),
)
def test_rank_tables_equal_bucketize(bounds, seed):
    bounds = torch.tensor(sorted(bounds), dtype=torch.float32)
    x = torch.cat(
        [
            normal((500,), seed, 1.0),
            bounds,
            torch.nextafter(bounds, torch.tensor(9.0)),
            torch.nextafter(bounds, torch.tensor(-9.0)),
        ]
    )
    try:
        table = rank_table(tuple(bounds.tolist()), "cpu")
    except ValueError:
        gaps = (bounds[1:] - bounds[:-1]) / (bounds[-1] - bounds[0])
        assert float(gaps.min()) < 1e-3
        return
    assert torch.equal(table.rank(x).long(), torch.bucketize(x, bounds))


# ---- permutations ---------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 300), cols=st.integers(1, 40))
def test_swizzle_has_an_inverse_and_follows_its_formula(rows, cols):
    scales = torch.arange(rows * cols).remainder(251).to(torch.uint8).view(rows, cols)
    swizzled = swizzle_scales(scales)
    assert torch.equal(unswizzle_scales(swizzled, rows, cols), scales)
    r, c = rows - 1, cols - 1
    tile = (r // 128) * (swizzled.shape[1] // 4) + c // 4
    assert swizzled.reshape(-1)[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] == scales[r, c]


@pytest.mark.parametrize("high_first", [True, False])
def test_nibbles_round_trip_and_order(high_first):
    codes = torch.arange(16, dtype=torch.uint8).view(1, 16)
    packed = pack_nibbles(codes, high_first)
    assert packed[0, 0] == (0x01 if high_first else 0x10)
    assert torch.equal(unpack_nibbles(packed, high_first), codes)
    signed = torch.arange(-8, 8, dtype=torch.int8).view(1, 16)
    assert torch.equal(sign_extend_nibbles(unpack_nibbles(pack_nibbles(signed, high_first), high_first)), signed)


# ---- AF4 ----------------------------------------------------------------------------------------------------
def test_af4_is_the_derived_table_and_beats_nf4_on_normal_blocks_of_64():
    script = Path(__file__).parents[2] / "bench" / "rounding" / "derive_af4.py"
    row = json.loads(subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout)
    assert list(get_format("bnb_af4").element.table) == pytest.approx(row["levels"], abs=2e-6)
    w = normal((512, 1024), 11, 1.0)
    largest = w.view(512, 16, 64).abs().amax(-1, keepdim=True)
    errors = {
        name: float(
            ((get_format(name).dequantize(get_format(name).quantize(w), (512, 1024)) - w).view(512, 16, 64) / largest)
            .abs()
            .mean()
        )
        for name in ("bnb_af4", "bnb_nf4")
    }
    assert errors["bnb_af4"] < errors["bnb_nf4"]  # mean absolute error of the normalised weights: AF4's objective
