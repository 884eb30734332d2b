"""What choosers and rounders are given: one layer's work weight with everything known about it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import cancel
from ..formats.base import Format
from ..numerics.scales import QParams
from .factor import Factor
from .objective import Aim, Objective


@dataclass(frozen=True, slots=True)
class Task:
    """layer: its name, for messages. work: float32 [Np, Kp], read only. options: `Recipe.options`.

    weights: float32 [Kp], how much an error in each column counts when scales are chosen; None: all the same.
    factor: what the rounder prepared of the Hessian. aim: what it minimises in place of `objective`.
    plain: float32 [Np, Kp], the layer's own weight where `work` is another one, which makes up for the layers before it.
    """

    layer: str
    fmt: Format
    work: Tensor
    objective: Objective
    options: dict[str, Any]
    generator: torch.Generator
    weights: Tensor | None = None
    factor: Factor | None = None
    aim: Aim | None = None
    plain: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.work.shape[0], self.work.shape[1]

    @property
    def judge(self) -> Aim:
        """The objective under which the result is compared with round-to-nearest."""
        return self.objective if self.aim is None else self.aim

    def poll(self) -> None:
        """Called at least once a second by every loop; raises Cancelled when the caller wants it."""
        cancel.poll()


@dataclass(frozen=True, slots=True)
class Rounded:
    """codes [Np, Kp] under the QParams qp. notes: what happened that the recipe did not ask for."""

    codes: Tensor
    qp: QParams
    notes: tuple[str, ...] = field(default=())


def layer_generator(seed: int, layer: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the seed and the layer's name only."""
    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
