"""Linear on 8-bit codes of both operands, scales applied per K group: fp8 with fp8, int8 with int8."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .weight import Geometry, Weight, on_device_of

_LAUNCH_BYTES = 4096  # shared memory left for the compiler's own use


@lru_cache(maxsize=16)
def _shared_bytes(device: torch.device) -> int:
    """What one program may use: 227 KiB on Hopper, 99 KiB on consumer GPUs."""
    if device.type != "cuda":
        return 1 << 20
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's types lack it


def scaled_dot_spec(codes: Tensor, scale: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """codes [M, K] with scale [M, KB] times the weight's codes with its scales -> [M, N] of dtype.

    Each K group's product is exact (here in float64), is scaled, and the groups are summed in float32.
    """
    g = weight.geometry
    row_scale = weight.scale.view(g.grid).repeat_interleave(g.group_rows, dim=0)
    out = torch.zeros((codes.shape[0], g.shape[0]), dtype=torch.float32, device=codes.device)
    for index in range(g.grid[1]):
        columns = slice(index * g.group_cols, (index + 1) * g.group_cols)
        part = codes[:, columns].to(torch.float64) @ weight.codes[:, columns].to(torch.float64).t()
        out += part.to(torch.float32) * scale[:, index, None] * row_scale[:, index]
    return (out if bias is None else out + bias.to(torch.float32)).to(dtype)


def _tile(m: int, geometry: Geometry) -> tuple[int, int, int]:
    """(rows of x, rows of the weight, warps) of one program, as timed on an H200 for M of 16 to 16384."""
    one_scale = geometry.whole_row or geometry.group_rows % 128 == 0
    if m <= 64:
        return (64, 64, 4) if one_scale else (64, 32, 4)
    if -(-m // 128) * -(-geometry.shape[0] // 128) < 256:  # too few large tiles to keep a large GPU busy
        return 64, 64, 4
    # Where every weight row has its own scale per group, a larger tile spills registers.
    return (128, 128, 8) if one_scale else (128, 64, 4)


def scaled_dot(codes: Tensor, scale: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As the specification within 2e-3 relative before rounding (Hopper sums fp8 products with about 14 bits).

    group_cols: a multiple of 64 that is a power of two, or the whole row. fp8 needs compute capability 8.9, int8 8.0.
    """
    import triton

    from .jit import scaled_dot_kernel

    g = weight.geometry
    m, (n, k) = codes.shape[0], g.shape
    out = torch.empty((m, n), dtype=dtype, device=codes.device)
    step = 128 if g.whole_row else min(128, g.group_cols)
    tile_m, tile_n, warps = _tile(m, g)
    stages = (_shared_bytes(codes.device) - _LAUNCH_BYTES) // ((tile_m + tile_n) * step)
    with on_device_of(codes):
        scaled_dot_kernel[(triton.cdiv(m, tile_m) * triton.cdiv(n, tile_n),)](
            codes,
            weight.codes,
            scale,
            weight.scale,
            bias,
            out,
            m,
            n,
            k,
            g.grid[1],
            g.group_rows,
            GROUP=g.group_constant,
            WHOLE_ROW=g.whole_row,
            ONE_BLOCK_ROW=g.group_rows % tile_n == 0,
            INTEGER=g.kind == "int8",
            HAS_BIAS=bias is not None,
            BM=tile_m,
            BN=tile_n,
            BK=step,
            GM=8,
            num_warps=warps,
            num_stages=max(2, min(4, stages)),
        )
    return out


def scaled_mm(codes: Tensor, scale: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same through torch's row-wise scaled matmul, bf16 out.

    One scale per row on both sides. N and K are multiples of 16.
    """
    return torch._scaled_mm(
        codes,
        weight.codes.t(),
        scale_a=scale,
        scale_b=weight.scale.view(1, -1),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=False,
    )
