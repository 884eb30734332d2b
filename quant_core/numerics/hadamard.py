"""ConvRot: group-wise rotation of a weight's input channels by the regular Hadamard matrix.

Rotating spreads an outlier channel over its group, so that one scale per row fits better. The matrix is
orthogonal and symmetric, so it is its own inverse; the runtime rotates the activations the same way.
Source: ComfyUI's `convrot` formats (comfy-kitchen); the matrix is the Kronecker power of the regular 4x4 one.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_PANEL = 1024  # rows or columns of a Hessian rotated at once
_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def is_power_of_four(value: int) -> bool:
    return value >= 4 and value & (value - 1) == 0 and value.bit_length() % 2 == 1


@lru_cache(maxsize=16)
def regular_hadamard(size: int, device: str = "cpu") -> Tensor:
    """float32 [size, size], orthogonal and symmetric; size a power of four."""
    if not is_power_of_four(size):
        raise ValueError(f"a regular Hadamard matrix needs a power of 4, got {size}")
    unit = torch.tensor(_H4, dtype=torch.float32)
    matrix = unit
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, unit)
    return (matrix / size**0.5).to(device)


def rotate_columns(w: Tensor, group: int) -> Tensor:
    """w: float32 [N, K], K % group == 0 -> W H per group, float32 [N, K]. Twice gives w back, but for rounding."""
    n, k = w.shape
    # This shape of the product, and no fast transform, because comfy-kitchen's bytes depend on the order of summation.
    return torch.matmul(w.reshape(n, k // group, group), regular_hadamard(group, str(w.device)).T).reshape(n, k)


def rotate_hessian(h: Tensor, group: int) -> None:
    """float32 [K, K], H = X^T X becomes the Hessian of the rotated inputs, R^T H R, in place."""
    for start in range(0, len(h), _PANEL):
        h[start : start + _PANEL] = rotate_columns(h[start : start + _PANEL], group)
    for start in range(0, len(h), _PANEL):
        h[:, start : start + _PANEL] = rotate_columns(h[:, start : start + _PANEL].T.contiguous(), group).T
