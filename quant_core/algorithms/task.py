"""What choosers and rounders are given, and what they give back. Nobody fills in or replaces a field on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.base import Format
from ..formats.slices import encode_rows
from ..numerics.scales import QParams
from .objective import Aim, Objective


@dataclass(frozen=True, slots=True)
class Task:
    """One layer to be rounded. work: float32 [Np, Kp], its weight in the format's work basis, read only.

    objective: what an error costs. generator: for every random draw.
    """

    fmt: Format
    work: Tensor
    objective: Objective
    generator: torch.Generator

    @property
    def shape(self) -> tuple[int, int]:
        return self.work.shape[0], self.work.shape[1]

    def encode(self, values: Tensor, qp: QParams) -> Tensor:
        """Codes [Np, Kp] of the grid points nearest to `values`, float32 [Np, Kp]: how a rounder ends.

        A slice of rows at a time. `fmt.encode` gives the same codes, but is for parts: of a whole weight on a GPU it
        takes up to four copies.
        """
        return encode_rows(self.fmt, values, qp)


@dataclass(frozen=True, slots=True)
class ScaleTask:
    """What scales are chosen for. work: float32 [Np, Kp], read only.

    weights: float32 [Kp], how much an error in each column counts; None: nothing is known of the inputs, and all
    columns count the same.
    """

    fmt: Format
    work: Tensor
    weights: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.work.shape[0], self.work.shape[1]


@dataclass(frozen=True, slots=True)
class Rounded:
    """codes [Np, Kp] under the QParams qp. notes: what happened that the recipe did not ask for."""

    codes: Tensor
    qp: QParams
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Begun:
    """What a rounder settled before the scales are chosen.

    weights: what the chooser weighs the columns by (ScaleTask.weights). judge: what the result and round-to-nearest
    are compared by. finish: takes the chosen scales, is called once, and may move the scales on.
    """

    weights: Tensor | None
    judge: Aim
    finish: Callable[[QParams], Rounded]


def layer_generator(seed: int, layer: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the seed and the layer's name only."""
    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
