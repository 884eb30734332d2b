"""What learned rounding minimises, with gradients in closed form. E = rounded - weight, float32 [N, K]."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..task import Task


@dataclass(frozen=True, slots=True)
class Projected:
    """|U^T E V|^2, the error along the weight's own leading singular directions, plus `ridge` times |E|^2.

    left: float32 [N, k]; right: float32 [K, k]; both with orthonormal columns.
    """

    left: Tensor
    right: Tensor
    ridge: float
    name: str = "projected"
    by_rows: bool = False

    def loss(self, error: Tensor) -> float:
        """Without the ridge: what is reported and judged."""
        return float((self.left.T @ (error @ self.right)).square().sum(dtype=torch.float64))

    def gradient(self, error: Tensor) -> Tensor:
        core = self.left.T @ (error @ self.right)
        return torch.addmm(error, self.left @ core, self.right.T, beta=2 * self.ridge, alpha=2)


@dataclass(frozen=True, slots=True)
class Output:
    """tr(E H E^T): the error of the layer's output on the calibration inputs."""

    hessian: Tensor
    name: str = "output"
    by_rows: bool = True

    def loss(self, error: Tensor) -> float:
        return max(0.0, float(((error @ self.hessian) * error).sum(dtype=torch.float64)))

    def gradient(self, error: Tensor) -> Tensor:
        return (error @ self.hessian).mul_(2)


@dataclass(frozen=True, slots=True)
class ProjectionSettings:
    """k = top_p * min(N, K), within min_k .. max_k. full_matrix: exact SVD instead of the randomised one."""

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
    """Orthonormal [N, rank] and [K, rank] that span about the leading singular spaces of w [N, K].

    Subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4). The start is drawn on the CPU, for every device.
    """
    right = torch.randn(w.shape[1], rank, generator=generator).to(w.device)
    for _ in range(rounds):
        left = torch.linalg.qr(w @ right).Q
        right = torch.linalg.qr(w.T @ left).Q
    return left, right
