"""Activations to 8-bit codes, one scale per row or per row and K group: one fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .weight import on_device_of

SMALLEST_ABSMAX = 1e-30  # a group of zeros keeps a normal scale and codes 0
LONGEST_GROUP = 1 << 16  # one program holds a whole group in registers
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def quantize_activation_spec(x: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M, K] of dtype, scale float32 [M, K / group], x ~ codes * scale.

    The group's absmax (at least 1e-30) lands on the largest code; nearest, ties to even. A group that holds a NaN
    gets the scale NaN, one that holds an infinity the scale Inf, so the layer's output shows it.
    """
    largest = _LARGEST[dtype]
    values = x.to(torch.float32).reshape(-1, group)
    absmax = values.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_ABSMAX)
    # Tensors on both sides: with a Python number torch multiplies by a rounded reciprocal, on some devices.
    limit = torch.full_like(absmax, largest)
    units = (values * (limit / absmax)).clamp(-largest, largest)
    codes = units.round() if dtype is torch.int8 else units
    return codes.to(dtype).view(x.shape), (absmax / limit).view(x.shape[0], -1)


def quantize_activation(x: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As the specification, byte for byte where x is finite. x: contiguous; group <= LONGEST_GROUP divides K."""
    import triton

    from .jit import quantize_groups_kernel

    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((x.shape[0], x.shape[1] // group), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(group)
    rows = max(1, 1024 // block)
    groups = x.numel() // group
    with on_device_of(x):
        quantize_groups_kernel[(triton.cdiv(groups, rows),)](
            x,
            codes,
            scale,
            groups,
            group,
            LARGEST=_LARGEST[dtype],
            INTEGER=dtype is torch.int8,
            ROWS=rows,
            BLOCK=block,
            num_warps=4 if block <= 4096 else 8,
        )
    return codes, scale
