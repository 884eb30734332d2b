"""What a layer should become when its inputs are off: the weight that makes up for the layers quantized before it.

Let x be a layer's inputs in the unquantized model, and y what the quantized layers before it deliver. However well W
is rounded, (x - y) W^T is left. The best weight for y is W + W E[(x - y)^T y] E[y^T y]^-1, so W is rounded towards
that. Source: the asymmetric term of GPTAQ, arXiv 2504.02692, here with a ridge that is chosen on calls kept aside.

Measured (bench/calibration/in_order.py): y must be what the FINAL layers before it deliver. Fitted to another rounding
of them, it costs 2 to 4 dB: most of what it undoes is the chance in that one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.precision import tensor_core_products

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # shares of the mean square of the inputs
_HELD = 4  # every fourth group judges
LEAST_GROUPS = _HELD
_ROWS, _JUDGED_ROWS = 1 << 16, 1 << 12


@dataclass(frozen=True, slots=True)
class InputPairs:
    """One layer's inputs at the same calls of the model. original[i], delivered[i]: [..., K], x and y of call i.

    groups[i]: equal numbers for calls that are alike, such as the steps of one picture. (): no two are alike.
    """

    original: Sequence[Tensor]
    delivered: Sequence[Tensor]
    groups: Sequence[int] = ()

    def held(self) -> frozenset[int]:
        """The calls that judge: every fourth group, whole.

        A call judges too kindly what was fitted to a call like it, so the calls of one group stay together.
        """
        groups = self.groups or range(len(self.original))
        chosen = frozenset(list(dict.fromkeys(groups))[_HELD - 1 :: _HELD])
        return frozenset(call for call, group in enumerate(groups) if group in chosen)


@dataclass(frozen=True, slots=True)
class Followed:
    """weight: float32 [N, K]. ridge: the chosen one; None where none helped, and weight is as it was.

    left: what is left of the error that the inputs bring in, |(x - y) W^T + y (W - weight)^T| / |(x - y) W^T| on the
    calls kept aside. 1.0 where weight is as it was. notes: for the layer's report.
    """

    weight: Tensor
    ridge: float | None = None
    left: float = 1.0
    notes: tuple[str, ...] = ()


def follow(w: Tensor, pairs: InputPairs, poll: Callable[[], None]) -> Followed:
    """w: float32 [N, K]. Three quarters of the calls fit. The others choose the ridge, or that w stays as it is.

    Fewer than LEAST_GROUPS groups cannot be split: then w stays. Memory: three matrices [K, K] and two of w's size.
    """
    held = pairs.held()
    if not held:
        return Followed(w)
    share = max(1, _ROWS // len(pairs.original))
    with tensor_core_products(w.device):
        sums = _Sums(w.shape[1], w.device)
        for call in range(len(pairs.original)):
            poll()
            if call not in held:
                sums.add(*_rows(pairs, call, share, w.device))
        parts = [_rows(pairs, call, max(1, _JUDGED_ROWS // len(held)), w.device) for call in sorted(held)]
        y, missing = (torch.cat(side) for side in zip(*parts, strict=True))
        before = float((missing @ w.T).square().sum(dtype=torch.float64))
        after = {}
        for one in RIDGES:
            poll()
            root = sums.root(one)
            if root is not None:
                taken = torch.cholesky_solve(y.T, root).T @ sums.cross
                after[one] = float(((missing - taken) @ w.T).square().sum(dtype=torch.float64))
        ridge = min(after, key=after.__getitem__, default=None)
        if ridge is None or after[ridge] >= before:
            return Followed(w)
        for call in sorted(held):
            sums.add(*_rows(pairs, call, share, w.device))
        root = sums.root(ridge)
        if root is None:
            return Followed(w)
        weight = torch.cholesky_solve((w @ sums.cross.T).T, root).T.add_(w)
    return Followed(weight.contiguous(), ridge, (after[ridge] / before) ** 0.5)


class _Sums:
    """gram: y^T y. cross: y^T (x - y). Both float32 [K, K], over the rows added so far."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.gram = torch.zeros(k, k, device=device)
        self.cross = torch.zeros(k, k, device=device)

    def add(self, y: Tensor, missing: Tensor) -> None:
        self.gram.addmm_(y.T, y)
        self.cross.addmm_(y.T, missing)

    def root(self, ridge: float) -> Tensor | None:
        """The lower Cholesky root of gram + ridge * its mean diagonal; None when that is not definite."""
        diagonal = self.gram.diagonal()
        kept = diagonal.clone()
        diagonal.add_(ridge * kept.mean())
        root, info = torch.linalg.cholesky_ex(self.gram)
        diagonal.copy_(kept)
        return root if int(info) == 0 else None


def _rows(pairs: InputPairs, call: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(y, x - y) of one call, float32 [R, K], at most `most` rows, evenly spaced."""
    x, y = (side[call].reshape(-1, side[call].shape[-1]) for side in (pairs.original, pairs.delivered))
    stride = -(-len(y) // most)
    x, y = (side[::stride].to(device, torch.float32) for side in (x, y))
    return y, x - y
