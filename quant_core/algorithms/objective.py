"""What an algorithm minimises: the error of the layer's output when its inputs are known, else the weight's own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..formats.base import Format
from ..numerics.scales import shape_of
from ..numerics.slices import row_slices
from .evidence import Evidence

_SLICE = 1 << 24  # weights whose product with the Hessian is held at once


class Aim(Protocol):
    """What a result is judged by: Objective here, or a rounder's own in fit/objectives.py.

    total_loss: of an error that comes in slices of rows, from the first row to the last.
    """

    @property
    def name(self) -> str: ...

    def total_loss(self, parts: Iterable[Tensor]) -> float: ...


@dataclass(frozen=True, slots=True)
class Objective:
    """In the work basis. hessian: float32 [Kp, Kp] or None. diagonal: float32 [Kp] or None, its diagonal.

    rows: how many input rows they were made of, 0 when unknown.
    name: "output" with a Hessian, "weighted" with its diagonal only, "weight" without data.
    """

    hessian: Tensor | None = None
    diagonal: Tensor | None = None
    rows: int = 0

    @property
    def name(self) -> str:
        if self.hessian is not None:
            return "output"
        return "weight" if self.diagonal is None else "weighted"

    def loss(self, error: Tensor) -> float:
        """tr(E H E^T) for E float32 [Np, Kp], summed in float64; >= 0."""
        total = torch.zeros((), dtype=torch.float64, device=error.device)
        for rows in row_slices(shape_of(error), _SLICE):
            part = error[rows]
            if self.hessian is not None:
                weighted = part @ self.hessian
            else:
                weighted = part if self.diagonal is None else part * self.diagonal
            total += (weighted * part).sum(dtype=torch.float64)
        return max(0.0, float(total))

    def total_loss(self, parts: Iterable[Tensor]) -> float:
        """The same for E in slices of rows."""
        return sum(self.loss(part) for part in parts)


def ratio(loss: float, reference: float) -> float:
    """Relative error: sqrt(loss / reference); 0 when both are 0, inf when only the reference is."""
    if reference == 0.0:
        return 0.0 if loss == 0.0 else math.inf
    return math.sqrt(loss / reference)


def make_objective(fmt: Format, evidence: Evidence, device: torch.device) -> Objective:
    """The objective for `fmt`'s work weight. A Hessian without any energy (no input was ever seen) counts as no data.

    A Hessian on another device, as one from a file is, is moved once. One on `device` is the caller's: it is copied
    where it must be changed (centred, rotated).
    """
    mean = evidence.mean.to(device, torch.float32) if evidence.centre and evidence.mean is not None else None
    if evidence.hessian is not None:
        hessian = evidence.hessian.to(device, torch.float32)
        if hessian is evidence.hessian and (mean is not None or fmt.rotation is not None):
            hessian = hessian.clone()
        hessian = fmt.prepare_hessian(hessian if mean is None else hessian.addr_(mean, mean, alpha=-1))
        diagonal = hessian.diagonal().clamp(min=0)
        if float(diagonal.sum()) > 0:
            return Objective(hessian, diagonal, rows=evidence.count)
    elif evidence.hessian_diagonal is not None:
        diagonal = evidence.hessian_diagonal.to(device, torch.float32)
        diagonal = prepare_diagonal(fmt, diagonal if mean is None else (diagonal - mean.square()).clamp_(min=0))
        if float(diagonal.sum()) > 0:
            return Objective(None, diagonal)
    return Objective()


def prepare_diagonal(fmt: Format, diagonal: Tensor) -> Tensor:
    """[K] -> [Kp]: padded, and averaged over the rotation groups (what rotating a diagonal Hessian leaves on it)."""
    pad = fmt.work_shape((1, diagonal.numel()))[1] - diagonal.numel()
    diagonal = torch.nn.functional.pad(diagonal, (0, pad))
    if fmt.rotation is not None:
        groups = diagonal.view(-1, fmt.rotation)
        diagonal = groups.mean(dim=1, keepdim=True).expand_as(groups).reshape(-1)
    return diagonal
