"""What learned rounding minimises, with gradients in closed form. E = rounded - weight, float32 [N, K], in row slices.

Each slice gives its share. The sum of the shares gives the loss, and is all that a gradient needs to know of other
rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..task import Task


class Target(Protocol):
    """coupled: one slice's gradient depends on the other slices, through the sum of the shares."""

    @property
    def name(self) -> str: ...

    @property
    def coupled(self) -> bool: ...

    def share(self, error: Tensor, rows: slice) -> Tensor:
        """A slice's share; leaves its `error` as it is."""

    def value(self, shares: Tensor) -> float:
        """The loss that is reported and judged. shares: the sum over all slices."""

    def gradient(self, error: Tensor, rows: slice, shares: Tensor | None) -> Tensor:
        """float32, of the shape of `error`, the slice's, which may be overwritten.

        shares: the sum over all slices; None where nothing is coupled.
        """

    def total_loss(self, parts: Iterable[Tensor]) -> float:
        """The loss of an error that comes in slices of any height, from its first row to its last."""


@dataclass(frozen=True, slots=True)
class Projected:
    """|U^T E V|^2, the error along the weight's own leading singular directions, plus `ridge` times |E|^2.

    left: float32 [N, k]; right: float32 [K, k]; both with orthonormal columns. A share is the slice's part of U^T E V.
    """

    left: Tensor
    right: Tensor
    ridge: float
    name: str = "projected"
    coupled: bool = True

    def share(self, error: Tensor, rows: slice) -> Tensor:
        """float32 [k, k]; leaves `error` as it is."""
        return self.left[rows].T @ (error @ self.right)

    def value(self, shares: Tensor) -> float:
        """The loss, without the ridge: what is reported and judged."""
        return float(shares.square().sum(dtype=torch.float64))

    def gradient(self, error: Tensor, rows: slice, shares: Tensor | None) -> Tensor:
        """Overwrites `error`."""
        if shares is None:
            raise ValueError("the projected error couples all rows: its gradient needs the sum of the shares")
        return error.addmm_(self.left[rows] @ shares, self.right.T, beta=2 * self.ridge, alpha=2)

    def total_loss(self, parts: Iterable[Tensor]) -> float:
        return _total_loss(self, parts)


@dataclass(frozen=True, slots=True)
class Output:
    """tr(E H E^T): the error of the layer's output on the calibration inputs. Every row stands for itself."""

    hessian: Tensor
    name: str = "output"
    coupled: bool = False

    def share(self, error: Tensor, rows: slice) -> Tensor:
        """float64 (); leaves `error` as it is."""
        return (error @ self.hessian).mul_(error).sum(dtype=torch.float64)

    def value(self, shares: Tensor) -> float:
        return max(0.0, float(shares))

    def gradient(self, error: Tensor, rows: slice, shares: Tensor | None) -> Tensor:
        return (error @ self.hessian).mul_(2)

    def total_loss(self, parts: Iterable[Tensor]) -> float:
        return _total_loss(self, parts)


def _total_loss(objective: Target, parts: Iterable[Tensor]) -> float:
    shares, row = None, 0
    for part in parts:
        share = objective.share(part, slice(row, row + part.shape[0]))
        shares, row = share if shares is None else shares.add_(share), row + part.shape[0]
    return 0.0 if shares is None else objective.value(shares)


@dataclass(frozen=True, slots=True)
class ProjectionSettings:
    """How many directions: top_p * min(N, K), within min_k .. max_k.

    full_matrix: exact SVD instead of the randomised one. For a square weight its vectors take two copies of the
    weight, and the solver has a workspace of its own.
    """

    top_p: float = 0.2
    min_k: int = 16
    max_k: int = 1280
    full_matrix: bool = False
    ridge: float = 0.005


def projected(task: Task, settings: ProjectionSettings) -> Projected:
    """The objective of this layer's weight."""
    n, k = task.shape
    rank = max(1, min(n, k, max(settings.min_k, min(settings.max_k, int(settings.top_p * min(n, k))))))
    if settings.full_matrix or 2 * rank > min(n, k):
        left, _, right = torch.linalg.svd(task.work, full_matrices=False)
        return Projected(left[:, :rank].contiguous(), right[:rank].T.contiguous(), settings.ridge)
    left, right = leading_directions(task.work, rank, task.generator)
    return Projected(left, right, settings.ridge)


def leading_directions(w: Tensor, rank: int, generator: torch.Generator, rounds: int = 4) -> tuple[Tensor, Tensor]:
    """Orthonormal [N, rank] and [K, rank] that nearly span the leading singular spaces of w [N, K].

    Subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4). The start is drawn on the CPU, for every device.
    """
    right = torch.randn(w.shape[1], rank, generator=generator).to(w.device)
    for _ in range(rounds):
        left = torch.linalg.qr(w @ right).Q
        right = torch.linalg.qr(w.T @ left).Q
    return left, right
