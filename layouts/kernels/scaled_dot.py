"""Linear on 8-bit codes of both operands, scales applied per K group: fp8 with fp8, int8 with int8."""
from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .weight import Weight

_LAUNCH_BYTES = 4096      # shared memory left for the compiler's own use


@lru_cache(maxsize=16)
def _shared_bytes(device: torch.device) -> int:
    """What one program may use: 227 KiB on Hopper, 99 KiB on consumer GPUs."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 1 << 20


def scaled_dot_spec(codes: Tensor, scale: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """codes [M, K] with scale [M, KB] times the weight's codes with its scales -> [M, N] of dtype.

    Each K group's product is exact (here in float64), is scaled, and the groups are summed in float32.
    """
    n, k = weight.shape
    group = weight.group_cols
    row_scale = weight.scale.repeat_interleave(weight.group_rows, dim=0)
    out = torch.zeros((codes.shape[0], n), dtype=torch.float32, device=codes.device)
    for index in range(k // group):
        columns = slice(index * group, (index + 1) * group)
        part = codes[:, columns].to(torch.float64) @ weight.codes[:, columns].to(torch.float64).t()
        out += part.to(torch.float32) * scale[:, index, None] * row_scale[:, index]
    return (out if bias is None else out + bias.to(torch.float32)).to(dtype)


def scaled_dot(codes: Tensor, scale: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As the specification within 2e-3 relative before rounding (Hopper sums fp8 products with about 14 bits).

    group_cols: a multiple of 64 that is a power of two, or the whole row. fp8 needs compute capability 8.9, int8 8.0.
    """
    import triton

    from .jit import scaled_dot_kernel
    m, k = codes.shape
    n = weight.shape[0]
    out = torch.empty((m, n), dtype=dtype, device=codes.device)
    step = 128 if weight.whole_row else min(128, weight.group_cols)
    tile_m = 64 if m <= 64 else 128
    tile_n = 64 if m <= 64 else 128
    stages = (_shared_bytes(codes.device) - _LAUNCH_BYTES) // ((tile_m + tile_n) * step)
    with torch.cuda.device_of(codes):
        scaled_dot_kernel[(triton.cdiv(m, tile_m) * triton.cdiv(n, tile_n),)](
            codes, weight.codes, scale, weight.scale, bias, out, m, n, k, weight.scale.shape[1], weight.group_rows,
            GROUP=weight.group_constant, WHOLE_ROW=weight.whole_row, ONE_BLOCK_ROW=weight.group_rows % tile_n == 0,
            INTEGER=weight.kind == "int8", HAS_BIAS=bias is not None, BM=tile_m, BN=tile_n, BK=step, GM=8,
            num_warps=4 if tile_m == 64 else 8, num_stages=max(2, min(4, stages)))
    return out


def scaled_mm(codes: Tensor, scale: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same through torch's row-wise scaled matmul. One scale per row on both sides; N, K multiples of 16; bf16 out."""
    return torch._scaled_mm(codes, weight.codes.t(), scale_a=scale, scale_b=weight.scale.t(),
                            bias=bias, out_dtype=dtype, use_fast_accum=False)
