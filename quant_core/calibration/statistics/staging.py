"""What waits to be worked into a layer's statistics: at a few rows a call it is launches that cost, not arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .selection import Part

LARGEST_SLOTS = 16


class StagedRows:
    """Rows of one layer, up to `size`, in the type in which they came. rows: None while nothing waits."""

    def __init__(self, size: int, in_features: int, device: torch.device) -> None:
        self._size, self._in_features, self._device = size, in_features, device
        self.rows: Tensor | None = None
        self._parts: list[Part] = []
        self._fill = self._capacity = 0

    def fits(self, x: Tensor, count: int) -> bool:
        """Whether `count` rows of x may come in before those that wait were taken."""
        return self.rows is None or (self._fill + count <= self._capacity and self.rows.dtype is x.dtype)

    def put(self, x: Tensor, index: Tensor, parts: Sequence[Part]) -> None:
        """One kernel. x: [n, K]; index: int64 on x's device, rows of x; parts: what they are, in their order."""
        count = index.numel()  # not len(), which is slow for a tensor: this runs at every call of every layer
        if self.rows is None:
            self._capacity = max(self._size, count)
            self.rows = torch.empty(self._capacity, self._in_features, dtype=x.dtype, device=self._device)
        target = self.rows[self._fill : self._fill + count]
        if x.device == self._device:
            torch.index_select(x, 0, index, out=target)
        else:
            target.copy_(x[index])
        self._parts += parts
        self._fill += count

    def take(self) -> tuple[Tensor, list[Part]] | None:
        """(rows [n, K], what they are): the caller's own from now on. None when nothing waits."""
        if self.rows is None:
            return None
        rows, parts = self.rows[: self._fill], self._parts
        self.rows, self._parts, self._fill = None, [], 0
        return rows, parts


class LargestValues:
    """The largest magnitude per channel over calls: one kernel a call, the rest every LARGEST_SLOTS calls."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._total = torch.zeros(in_features, dtype=torch.float32, device=device)
        self._slots: Tensor | None = None
        self._fill = 0

    def see(self, x: Tensor) -> None:
        """x: [n, K] of any float type, n > 0. A NaN hides its channel in this call; Inf counts."""
        if self._slots is not None and (self._fill == LARGEST_SLOTS or self._slots.dtype is not x.dtype):
            self.total()
        if self._slots is None:
            self._slots = torch.empty(LARGEST_SLOTS, self._total.numel(), dtype=x.dtype, device=self._total.device)
        slot = self._slots[self._fill]
        if x.device == slot.device:
            torch.linalg.vector_norm(x, ord=torch.inf, dim=0, out=slot)
        else:
            slot.copy_(torch.linalg.vector_norm(x, ord=torch.inf, dim=0))
        self._fill += 1

    def total(self) -> Tensor:
        """float32 [K]: the accumulator itself."""
        if self._slots is not None:
            known = self._slots[: self._fill].to(torch.float32).nan_to_num_(nan=0.0, posinf=torch.inf)
            torch.maximum(self._total, known.amax(dim=0), out=self._total)
            self._slots, self._fill = None, 0
        return self._total

    def replace(self, total: Tensor) -> None:
        self._total, self._slots, self._fill = total, None, 0
