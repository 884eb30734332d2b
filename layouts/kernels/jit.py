"""The Triton source of all kernels. Imports triton: import this module inside a launcher, never at the top of another.

Shapes: x [M, K] activations, weight codes [N, K] (nibbles: bytes [N, K / 2], high nibble = even column), weight scales
[NB, KB] float32, one per GROUP columns and `group_rows` rows. WHOLE_ROW: one scale per row, KB is 1 and GROUP unused.
All tensors are contiguous; M, N and K need not be multiples of the tile.
"""

import os

import triton
import triton.language as tl

# No global NaN: Triton checks that globals still equal what was compiled in, and a NaN equals nothing.
_INF = tl.constexpr(float("inf"))
# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to an integer, ties to even, on every device.
_ROUND = tl.constexpr(12582912.0)
_FLOOR = tl.constexpr(1e-30)
# Triton's interpreter (CI has no GPU) truncates in float casts where hardware rounds, and multiplies bf16 as integers.
# These two faults are mended below, so that the same tests hold in both.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _keep_bits(values, DROP: tl.constexpr):
    """float32 rounded to nearest even with the last DROP mantissa bits zero."""
    bits = values.to(tl.uint32, bitcast=True)
    bits = ((bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) >> DROP) << DROP
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def cast(values, dtype: tl.constexpr):
    """float32 -> dtype, to nearest even; for fp8, |values| <= 448."""
    if _INTERPRETED:
        if dtype == tl.bfloat16:
            values = tl.where(values == values, _keep_bits(values, 16), values)
        elif dtype == tl.float8e4nv:
            tiny = (values + 24576.0) - 24576.0  # a multiple of 2**-9
            tiny = tl.where(tiny == 0.0, values * 0.0, tiny)  # keeps the sign of a zero
            values = tl.where(tl.abs(values) < 0.015625, tiny, _keep_bits(values, 20))
    return values.to(dtype)


@triton.jit
def dot(a, b, total):
    if _INTERPRETED:  # noqa: SIM108  a branch that triton drops when it compiles
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def element_values(raw, codebook, KIND: tl.constexpr):
    """Codes (uint8, or int8 for KIND "int8") -> float32 grid values."""
    if KIND == "fp8":
        # E4M3 bits moved into a float16 mean value / 256, subnormals included: exact, and needs no fp8 hardware.
        half = ((raw & 0x80).to(tl.uint16) << 8) | ((raw & 0x7F).to(tl.uint16) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where((raw & 0x7F) == 0x7F, _INF - _INF, value)
    elif KIND == "nibble":
        # A gather stays in registers: on an H200 2 times as fast as loads from the table, 3 times a tree of selects.
        flat = tl.reshape(raw.to(tl.int32), (raw.shape[0] * raw.shape[1],))
        value = tl.reshape(tl.gather(tl.load(codebook + tl.arange(0, 16)), flat, 0), raw.shape)
    else:
        value = raw.to(tl.float32)
    return value


@triton.jit
def load_values(codes, codebook, rows, row_mask, first, k, KIND: tl.constexpr, BK: tl.constexpr):
    """Grid values of columns first .. first + BK, float32 [len(rows), BK]; zero codes outside the weight."""
    if KIND == "nibble":
        half = first // 2 + tl.arange(0, BK // 2)
        mask = row_mask[:, None] & (half < k // 2)[None, :]
        raw = tl.load(codes + rows.to(tl.int64)[:, None] * (k // 2) + half[None, :], mask=mask, other=0)
        high = element_values(raw >> 4, codebook, KIND)
        low = element_values(raw & 15, codebook, KIND)
        values = tl.interleave(high, low)
    else:
        columns = first + tl.arange(0, BK)
        mask = row_mask[:, None] & (columns < k)[None, :]
        raw = tl.load(codes + rows.to(tl.int64)[:, None] * k + columns[None, :], mask=mask, other=0)
        values = element_values(raw, codebook, KIND)
    return values


@triton.jit
def decode_kernel(
    codes,
    scale,
    codebook,
    out,
    n,
    k,
    kb,
    group_rows,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[N, K] = value * scale, rounded once to out's dtype. GROUP divides BK or BK divides GROUP."""
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.program_id(0) * BK
    row_mask = rows < n
    values = load_values(codes, codebook, rows, row_mask, first, k, KIND, BK)
    scale_row = scale + (rows // group_rows).to(tl.int64) * kb
    if WHOLE_ROW:
        values = values * tl.load(scale_row, mask=row_mask, other=0.0)[:, None]
    elif BK <= GROUP:
        values = values * tl.load(scale_row + first // GROUP, mask=row_mask, other=0.0)[:, None]
    else:
        group = first // GROUP + tl.arange(0, BK // GROUP)
        mask = row_mask[:, None] & (group < kb)[None, :]
        scales = tl.load(scale_row[:, None] + group[None, :], mask=mask, other=0.0)
        values = tl.reshape(tl.reshape(values, (BN, BK // GROUP, GROUP)) * scales[:, :, None], (BN, BK))
    columns = first + tl.arange(0, BK)
    tl.store(
        out + rows.to(tl.int64)[:, None] * k + columns[None, :],
        cast(values, out.dtype.element_ty),
        mask=row_mask[:, None] & (columns < k)[None, :],
    )


@triton.jit
def gemv_kernel(
    x,
    codes,
    scale,
    codebook,
    bias,
    out,
    n,
    k,
    kb,
    group_rows,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One row of x (program axis 1) times BN weight rows, all in float32. GROUP divides BK."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row_mask = rows < n
    x_row = x + tl.program_id(1).to(tl.int64) * k
    scale_row = scale + (rows // group_rows).to(tl.int64) * kb
    total = tl.zeros((BN,), dtype=tl.float32)
    for first in range(0, k, BK):
        values = load_values(codes, codebook, rows, row_mask, first, k, KIND, BK)
        columns = first + tl.arange(0, BK)
        # The padding reads code 0, which is not zero in a codebook: x is 0 there.
        products = values * tl.load(x_row + columns, mask=columns < k, other=0.0).to(tl.float32)[None, :]
        if WHOLE_ROW:
            total += tl.sum(products, axis=1)
        else:
            group = first // GROUP + tl.arange(0, BK // GROUP)
            mask = row_mask[:, None] & (group < kb)[None, :]
            scales = tl.load(scale_row[:, None] + group[None, :], mask=mask, other=0.0)
            total += tl.sum(tl.sum(tl.reshape(products, (BN, BK // GROUP, GROUP)), axis=2) * scales, axis=1)
    if WHOLE_ROW:
        total = total * tl.load(scale_row, mask=row_mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(1).to(tl.int64) * n + rows, cast(total, out.dtype.element_ty), mask=row_mask)


@triton.jit
def tile_of(pid, m, n, BM: tl.constexpr, BN: tl.constexpr, GM: tl.constexpr):
    """Program id -> (row tile, column tile), GM row tiles at a time so that neighbours share weights in L2."""
    tiles_m = tl.cdiv(m, BM)
    tiles_n = tl.cdiv(n, BN)
    band = pid // (GM * tiles_n)
    height = min(tiles_m - band * GM, GM)
    within = pid % (GM * tiles_n)
    return band * GM + within % height, within // height


@triton.jit
def decode_dot_kernel(
    x,
    codes,
    scale,
    codebook,
    bias,
    out,
    m,
    n,
    k,
    kb,
    group_rows,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GM: tl.constexpr,
):
    """out = x W^T + bias: weights decoded in the kernel and rounded to x's dtype. BK divides GROUP."""
    tile_m, tile_n = tile_of(tl.program_id(0), m, n, BM, BN, GM)
    x_rows = tile_m * BM + tl.arange(0, BM)
    rows = tile_n * BN + tl.arange(0, BN)
    row_mask = rows < n
    x_start = x + x_rows.to(tl.int64)[:, None] * k
    scale_row = scale + (rows // group_rows).to(tl.int64) * kb
    row_scale = tl.load(scale_row, mask=row_mask, other=0.0)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, k, BK):
        columns = first + tl.arange(0, BK)
        values = load_values(codes, codebook, rows, row_mask, first, k, KIND, BK)
        if not WHOLE_ROW:
            row_scale = tl.load(scale_row + first // GROUP, mask=row_mask, other=0.0)
        weights = cast(values * row_scale[:, None], x.dtype.element_ty)
        inputs = tl.load(x_start + columns[None, :], mask=(x_rows < m)[:, None] & (columns < k)[None, :], other=0.0)
        total = dot(inputs, tl.trans(weights), total)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + x_rows.to(tl.int64)[:, None] * n + rows[None, :],
        cast(total, out.dtype.element_ty),
        mask=(x_rows < m)[:, None] & row_mask[None, :],
    )


@triton.jit
def scaled_dot_kernel(
    a,
    b,
    a_scale,
    b_scale,
    bias,
    out,
    m,
    n,
    k,
    kb,
    group_rows,
    GROUP: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    ONE_BLOCK_ROW: tl.constexpr,
    INTEGER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GM: tl.constexpr,
):
    """out = (a * a_scale)(b * b_scale)^T + bias on 8-bit codes; each scale applied to its K group's exact product.

    a_scale: [M, KB]. BK divides GROUP. INTEGER: int8 codes, int32 products; otherwise fp8 with float32 products.
    ONE_BLOCK_ROW: BN divides group_rows, so the tile has one weight scale per K group.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), m, n, BM, BN, GM)
    x_rows = tile_m * BM + tl.arange(0, BM)
    rows = tile_n * BN + tl.arange(0, BN)
    a_mask, row_mask = x_rows < m, rows < n
    inner = tl.arange(0, BK)
    a_tile = a + x_rows.to(tl.int64)[:, None] * k + inner[None, :]
    b_tile = b + rows.to(tl.int64)[None, :] * k + inner[:, None]
    a_scale_row = a_scale + x_rows.to(tl.int64) * kb
    b_scale_row = b_scale + (rows // group_rows).to(tl.int64) * kb
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, k, BK):
        left_mask = a_mask[:, None] & (inner < k - first)[None, :]
        right_mask = row_mask[None, :] & (inner < k - first)[:, None]
        if INTEGER:
            left = tl.load(a_tile, mask=left_mask, other=0)
            right = tl.load(b_tile, mask=right_mask, other=0)
            part = tl.dot(left, right, out_dtype=tl.int32).to(tl.float32)
        else:
            left = tl.load(a_tile, mask=left_mask, other=0.0)
            right = tl.load(b_tile, mask=right_mask, other=0.0)
            part = dot(left, right, tl.zeros((BM, BN), dtype=tl.float32))
        if WHOLE_ROW:
            total += part
        else:
            left_scale = tl.load(a_scale_row + first // GROUP, mask=a_mask, other=0.0)
            if ONE_BLOCK_ROW:
                left_scale = left_scale * tl.load(b_scale + (tile_n * BN // group_rows) * kb + first // GROUP)
                total += part * left_scale[:, None]
            else:
                right_scale = tl.load(b_scale_row + first // GROUP, mask=row_mask, other=0.0)
                total += part * left_scale[:, None] * right_scale[None, :]
        a_tile += BK
        b_tile += BK
    if WHOLE_ROW:
        left_scale = tl.load(a_scale_row, mask=a_mask, other=0.0)
        total = total * left_scale[:, None] * tl.load(b_scale_row, mask=row_mask, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + x_rows.to(tl.int64)[:, None] * n + rows[None, :],
        cast(total, out.dtype.element_ty),
        mask=a_mask[:, None] & row_mask[None, :],
    )


@triton.jit
def quantize_groups_kernel(
    x,
    codes,
    scale,
    groups,
    length,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Symmetric codes and one scale per group: x seen as [groups, length], length <= BLOCK."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    offsets = rows[:, None] * length + columns[None, :]
    mask = (rows < groups)[:, None] & (columns < length)[None, :]
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(values), axis=1), _FLOOR)
    # max() drops a NaN; a NaN activation must reach the output.
    spoilt = tl.max((values != values).to(tl.int32), axis=1) > 0
    largest = tl.where(spoilt, _INF - _INF, largest)
    # div_rn: the default float32 division is approximate on CUDA.
    units = values * tl.div_rn(tl.full(largest.shape, LARGEST, tl.float32), largest)[:, None]
    units = tl.minimum(tl.maximum(units, -LARGEST), LARGEST)
    if INTEGER:
        units = (units + _ROUND) - _ROUND
    tl.store(codes + offsets, cast(units, codes.dtype.element_ty), mask=mask)
    tl.store(scale + rows, tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32)), mask=rows < groups)
