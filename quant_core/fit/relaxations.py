"""Continuous stand-ins for the choice of codes. Both know the two grid points next to each weight."""
from __future__ import annotations

import torch
from torch import Tensor

_STRETCH = 1.2        # the sigmoid is stretched beyond 0 and 1, so that it reaches them
_SHARP, _SOFT = 2.0, 20.0


class AdaRound:
    """rounded = low + (high - low) * gate, gate from a stretched sigmoid, pushed to 0 or 1 as the fit goes on.

    Source: AdaRound, arXiv 2004.10568. It starts at the weight itself: gate = (w - low) / (high - low).
    """

    judged_every = 10

    def __init__(self, work: Tensor, low: Tensor, high: Tensor, pressure: float) -> None:
        self.low, self.gap, self.pressure = low, high - low, pressure
        share = torch.where(self.gap > 0, (work - low) / self.gap.clamp(min=1e-30), torch.full_like(work, 0.5))
        inner = ((share.clamp(0, 1) - 0.5) / _STRETCH + 0.5).clamp(1e-4, 1 - 1e-4)
        self.variable = torch.logit(inner)

    def _gate(self) -> Tensor:
        return (torch.sigmoid(self.variable) * _STRETCH).sub_((_STRETCH - 1) / 2)

    def soft(self) -> Tensor:
        return torch.addcmul(self.low, self.gap, self._gate().clamp_(0, 1))

    def hard(self) -> Tensor:
        return torch.where(self.variable > 0, self.low + self.gap, self.low)

    def gradient(self, of_rounded: Tensor, unit: float, progress: float) -> Tensor:
        """Gradient of the variable. unit: the size of a typical gradient; progress: 0 at the start, 1 at the end."""
        gate = self._gate()
        inside = (gate > 0) & (gate < 1)
        grad = of_rounded * self.gap / unit
        if progress > 0.2:
            # d/dgate of 1 - |2 gate - 1|^power: the power falls, so the push starts near 0 and 1 and moves inwards.
            power = _SHARP + (_SOFT - _SHARP) * (1 - (progress - 0.2) / 0.8)
            away = gate.mul(2).sub_(1).clamp_(-1, 1)
            grad -= self.pressure * power * away.abs().pow_(power - 1).mul_(away.sign()).mul_(2)
        inner = torch.sigmoid(self.variable)
        return grad.mul_(inner).mul_(1 - inner).mul_(_STRETCH).mul_(inside)


class StraightThrough:
    """rounded = the nearer of the two neighbours to w + variable * gap; the gradient passes the rounding unchanged."""

    judged_every = 1

    def __init__(self, work: Tensor, low: Tensor, high: Tensor, pressure: float) -> None:
        self.low, self.gap = low, high - low
        share = torch.where(self.gap > 0, (work - low) / self.gap.clamp(min=1e-30), torch.zeros_like(work))
        self.start = share.clamp(0, 1).sub_(0.5)
        self.variable = torch.zeros_like(work)

    def soft(self) -> Tensor:
        return self.hard()

    def hard(self) -> Tensor:
        return torch.where(self.start + self.variable > 0, self.low + self.gap, self.low)

    def gradient(self, of_rounded: Tensor, unit: float, progress: float) -> Tensor:
        return of_rounded * self.gap / unit


RELAXATIONS = {"adaround": AdaRound, "straight_through": StraightThrough}
