"""How much device memory a layer needs, and where it runs when that is not there. Decided before the layer starts."""

from __future__ import annotations

import torch

_HESSIANS = 1.6  # the layer's own, changed in place, and the half that the factor takes


def needed_bytes(shape: tuple[int, int], weight_copies: float, hessian: bool) -> int:
    """Peak device memory of one layer. weight_copies: what its rounder takes (Rounder.weight_copies)."""
    n, k = shape
    return int(4 * n * k * weight_copies + (4 * k * k * _HESSIANS if hessian else 0))


def following_bytes(shape: tuple[int, int]) -> int:
    """Peak device memory of asymmetric.follow, the weight included: see there."""
    n, k = shape
    return 4 * (3 * k * k + 3 * n * k + (1 << 16) * k // 4)


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a CUDA device, its cached blocks included; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def choose_device(device: torch.device, free: int | None, needed: int) -> tuple[torch.device, str | None]:
    """`device`, or the CPU with the reason. The method stays the same; only its place and speed change."""
    if free is None or needed <= free:
        return device, None
    return torch.device("cpu"), (
        f"computed on the CPU: it needs about {needed / 2**30:.1f} GiB, {device} has "
        f"{free / 2**30:.1f} GiB free. Close other programs to use the GPU"
    )
