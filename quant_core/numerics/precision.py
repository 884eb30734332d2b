"""Products on tensor cores where float32's last digits decide nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_core_products(device: torch.device) -> Iterator[None]:
    """On CUDA, float32 matrix products inside may round their factors to TF32's 11 bits. Elsewhere nothing changes.

    Right for corrections that are rounded to a far coarser grid, and for sums of squares that are compared with each
    other. The setting is the process's and is put back: don't enter while another thread needs exact products.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
