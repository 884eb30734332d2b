"""Rows kept aside for judging: a weighted reservoir sample that merges.

Every offered row draws a key -E / weight with E exponential (Efraimidis and Spirakis, 2006), and the rows with the
largest keys stay. Which rows these are depends on the draws alone, so merging is: keep the largest keys of both.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Reservoir:
    """At most `size` rows. rows: bf16 [size, K] on the layer's device. keys: float32 [size] on the CPU, -inf = empty.

    The keys stay on the CPU: the choice needs no look at the data, so nothing waits for the GPU.
    """

    def __init__(self, size: int, in_features: int, device: torch.device | str) -> None:
        self.rows = torch.zeros(size, in_features, dtype=torch.bfloat16, device=device)
        self.keys = torch.full((size,), -torch.inf, device="cpu")

    @property
    def size(self) -> int:
        return len(self.keys)

    def offer(self, x: Tensor, index: Tensor, keys: Tensor) -> None:
        """x: [n, K]. index: int64 [m] on the CPU, the rows of x on offer; keys: float32 [m] on the CPU."""
        entering, slots = self.choose(keys)
        if len(entering):
            self.place(
                x[index[entering].to(x.device, non_blocking=True)], slots.to(self.rows.device, non_blocking=True)
            )

    def choose(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(which of the offered rows enter, where), int64 on the CPU; `place` must follow.

        keys: float32 [m] on the CPU.
        """
        size = self.size
        best = torch.cat([self.keys, keys]).topk(size).indices
        entering = best[best >= size] - size
        stays = torch.zeros(size, dtype=torch.bool, device="cpu")
        stays[best[best < size]] = True
        slots = (~stays).nonzero().flatten()  # as many as rows enter
        self.keys[slots] = keys[entering]
        return entering, slots

    def place(self, rows: Tensor, slots: Tensor) -> None:
        """rows: [e, K]; slots: int64 [e] on the reservoir's device."""
        self.rows[slots] = rows.to(self.rows.device, torch.bfloat16)

    def merge(self, other: Reservoir) -> None:
        """Keep the rows with the largest keys of both."""
        self.offer(other.rows, torch.arange(other.size, device="cpu"), other.keys)

    def filled(self) -> Tensor:
        """The finite rows held, bf16 [R, K], in order of falling key."""
        order = self.keys.argsort(descending=True, stable=True)
        order = order[self.keys[order] > -torch.inf]
        rows = self.rows[order.to(self.rows.device)]
        return rows[torch.isfinite(rows).all(dim=1)]


def draw_keys(count: int, weight: float, generator: torch.Generator) -> Tensor:
    """float32 [count], each below 0. weight > 0: a row of twice the weight is kept twice as often."""
    return -torch.empty(count, device="cpu").exponential_(1.0, generator=generator) / weight
