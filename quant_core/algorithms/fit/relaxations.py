"""Continuous stand-ins for the choice of codes, for a slice of weights with its grid neighbours low and high.

Both keep one number per weight; hardened, the weight takes `high` where that number is above zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_STRETCH = 1.2  # the sigmoid is stretched beyond 0 and 1, so that it reaches them
_SHARP, _SOFT = 2.0, 20.0
_PUSHED_FROM = 0.2  # of the iterations


class Relaxation(Protocol):
    """judged_every: how many iterations lie between two looks at the hardened result."""

    judged_every: int

    def start(self, work: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The variable at the weight itself."""

    def soft(self, variable: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The weight that the variable stands for."""

    def gradient(self, variable: Tensor, of_gate: Tensor, progress: float, exact: bool) -> Tensor:
        """The variable's gradient from that of the soft weight.

        of_gate: times (high - low), in units of a typical one; it is overwritten. progress: 0 at the start, 1 at the
        end. exact: the variable is kept as float32, so it is what it was set to.
        """


def harden(variable: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The grid points that the variable stands for, exactly. On a CPU this lerp is five times as fast as where."""
    return torch.lerp(low, high, (variable > 0).to(low.dtype))


def _share(work: Tensor, low: Tensor, high: Tensor, of_none: float) -> Tensor:
    """Where the weight lies between its neighbours, 0 .. 1; `of_none` where both are the same."""
    gap = high - low
    share = (work - low).div_(gap.clamp(min=1e-30)).clamp_(0, 1)
    return share.masked_fill_(gap <= 0, of_none)


class AdaRound:
    """rounded = low + (high - low) * gate, gate from a stretched sigmoid, pushed to 0 or 1 as the fit goes on.

    Source: AdaRound, arXiv 2004.10568. It starts at the weight itself: gate = (w - low) / (high - low).
    """

    judged_every = 10

    def __init__(self, pressure: float) -> None:
        self.pressure = pressure

    def start(self, work: Tensor, low: Tensor, high: Tensor) -> Tensor:
        inner = _share(work, low, high, 0.5).sub_(0.5).div_(_STRETCH).add_(0.5)
        return inner.clamp_(1e-4, 1 - 1e-4).logit_()

    @staticmethod
    def _gate(inner: Tensor) -> Tensor:
        return (inner * _STRETCH).sub_((_STRETCH - 1) / 2)

    def soft(self, variable: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.lerp(low, high, self._gate(torch.sigmoid(variable)).clamp_(0, 1))

    def gradient(self, variable: Tensor, of_gate: Tensor, progress: float, exact: bool) -> Tensor:
        """A variable that is not exact does not start at the weight exactly, and waits for the push.

        Following its own rounding errors until then cost RAdam an eighth of its gain.
        """
        if progress <= _PUSHED_FROM and not exact:
            return of_gate.zero_()
        inner = torch.sigmoid(variable)
        gate = self._gate(inner)
        inside = (gate > 0).logical_and_(gate < 1)
        if progress > _PUSHED_FROM:
            # d/dgate of 1 - |2 gate - 1|^power: the power falls, so the push starts near 0 and 1 and moves inwards.
            power = _SHARP + (_SOFT - _SHARP) * (1 - (progress - _PUSHED_FROM) / (1 - _PUSHED_FROM))
            away = gate.mul_(2).sub_(1).clamp_(-1, 1)
            of_gate.sub_(away.abs().pow_(power - 1).copysign_(away), alpha=2 * self.pressure * power)
        return of_gate.mul_(inner).mul_(inner.neg_().add_(1)).mul_(_STRETCH).mul_(inside)


class StraightThrough:
    """rounded = the neighbour that is nearer to w + moved * (high - low).

    The gradient passes the rounding unchanged. The variable is how far that lies above the middle, in gaps. Nothing is
    pushed: `pressure` is for AdaRound.
    """

    judged_every = 1

    def __init__(self, pressure: float) -> None:
        del pressure

    def start(self, work: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return _share(work, low, high, 0.0).sub_(0.5)

    def soft(self, variable: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return harden(variable, low, high)

    def gradient(self, variable: Tensor, of_gate: Tensor, progress: float, exact: bool) -> Tensor:
        return of_gate


RELAXATIONS: dict[str, Callable[[float], Relaxation]] = {"adaround": AdaRound, "straight_through": StraightThrough}
