"""Stored weights to a float matrix in one pass: what dequantization costs on a GPU is its memory traffic."""

from __future__ import annotations

import torch
from torch import Tensor

from .weight import Weight, decoded, on_device_of


def decode_spec(weight: Weight, dtype: torch.dtype) -> Tensor:
    """float32 value * scale, rounded once to dtype: [N, K]."""
    return decoded(weight).to(dtype)


def decode(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Equal to the specification bit for bit. group_cols: a power of two, or the whole row."""
    import triton

    from .jit import decode_kernel

    g = weight.geometry
    n, k = g.shape
    out = torch.empty((n, k), dtype=dtype, device=weight.codes.device)
    rows, cols = 16, 256
    with on_device_of(out):
        decode_kernel[(triton.cdiv(k, cols), triton.cdiv(n, rows))](
            raw_codes(weight),
            weight.scale,
            weight.codebook,
            out,
            n,
            k,
            g.grid[1],
            g.group_rows,
            KIND=g.kind,
            GROUP=g.group_constant,
            WHOLE_ROW=g.whole_row,
            BN=rows,
            BK=cols,
            num_warps=4,
        )
    return out


def raw_codes(weight: Weight) -> Tensor:
    """fp8 codes as bytes, because older chips have no fp8 type; others as they are."""
    return weight.codes.view(torch.uint8) if weight.geometry.kind == "fp8" else weight.codes
