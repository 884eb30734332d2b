"""Linear with float activations: weights decoded inside the kernel. A few rows of x, or a tile of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .decode import raw_codes
from .weight import Weight, decoded, on_device_of


def gemv_spec(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; products and sums in float32, the weight not rounded to x's dtype."""
    out = x.to(torch.float32) @ decoded(weight).t()
    return (out if bias is None else out + bias.to(torch.float32)).to(x.dtype)


def gemv(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """As the specification but for the order of the float32 sum; each row of x reads the weight again (from L2).

    x: contiguous; group_cols: a power of two up to 1024, or the whole row. Tolerance: 1e-5 relative before rounding.
    """
    import triton

    from .jit import gemv_kernel

    g = weight.geometry
    m, (n, k) = x.shape[0], g.shape
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    rows = 4
    with on_device_of(x):
        gemv_kernel[(triton.cdiv(n, rows), m)](
            x,
            raw_codes(weight),
            weight.scale,
            weight.codebook,
            bias,
            out,
            n,
            k,
            g.grid[1],
            g.group_rows,
            KIND=g.kind,
            GROUP=g.group_constant,
            WHOLE_ROW=g.whole_row,
            HAS_BIAS=bias is not None,
            BN=rows,
            BK=1024,
            num_warps=2,
        )
    return out


def decode_dot_spec(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N]: the weight rounded to x's dtype, sums in float32, one rounding at the end."""
    out = x.to(torch.float32) @ decoded(weight).to(x.dtype).to(torch.float32).t()
    return (out if bias is None else out + bias.to(torch.float32)).to(x.dtype)


def decode_dot(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """As the specification but for the order of the float32 sum. x: contiguous bf16 or fp16."""
    import triton

    from .jit import decode_dot_kernel

    g = weight.geometry
    m, (n, k) = x.shape[0], g.shape
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    # Tiles timed on an H200: with few rows the longest K step the group allows, with many the weight tile narrow.
    longest = 128 if m <= 16 else 64
    step = longest if g.whole_row else min(longest, g.group_cols)
    tile_m, tile_n = (16, 32) if m <= 16 else (32, 32) if m <= 32 else (64, 32)
    with on_device_of(x):
        decode_dot_kernel[(triton.cdiv(m, tile_m) * triton.cdiv(n, tile_n),)](
            x,
            raw_codes(weight),
            weight.scale,
            weight.codebook,
            bias,
            out,
            m,
            n,
            k,
            g.grid[1],
            g.group_rows,
            KIND=g.kind,
            GROUP=g.group_constant,
            WHOLE_ROW=g.whole_row,
            HAS_BIAS=bias is not None,
            BM=tile_m,
            BN=tile_n,
            BK=step,
            GM=8,
            num_warps=4,
            num_stages=4 if m <= 16 else 3,
        )
    return out
