"""H = U D U^T of a Hessian in a chosen column order: the weights with which earlier columns' errors reach later ones.

With U unit upper triangular, tr(E H E^T) = sum_k D_k |(E U)_k|^2, so a column that is rounded to the nearest of
w_k + sum_{j<k} E_j U_jk adds only its own rounding error. This is GPTQ's update (arXiv 2210.17323) in the form of
LDLQ (arXiv 2307.13304): it needs one factorisation and no inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 512  # columns factored at once


@dataclass(frozen=True, slots=True)
class Factor:
    """order: int64 [K], column j of U belongs to input channel order[j]. panels: strictly upper columns of U, float16.

    Panel p holds rows 0 .. end of its own columns only, so all panels together take half of [K, K], and as float16 a
    quarter of H. In float32 they would be larger than the weight of a wide layer; the 5e-4 of a correction that
    float16 costs is far below a grid step. Whoever has used the panels up clears the list.
    pivots: float32 [K], D in that order. damping: the share of the diagonal that was added.
    """

    order: Tensor
    panels: list[Tensor]
    pivots: Tensor
    damping: float

    def columns(self, start: int, stop: int) -> Tensor:
        """U[:stop, start:stop] in float32, the diagonal 0. start..stop lies within one panel."""
        first = start // PANEL * PANEL
        return self.panels[start // PANEL][:stop, start - first : stop - first].float()


def column_order(diagonal: Tensor, order: str) -> Tensor:
    """int64 [K]. "activation": falling diagonal, so that the channels that matter most are rounded first."""
    if order == "natural":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def damped(diagonal: Tensor, damping: float) -> Tensor:
    """What is added to a Hessian's diagonal [K]: a share of each channel's own mean square. Dead ones get a trace.

    A share of the mean over the channels would drown the weak channels of a layer with a few strong ones. Measured
    against it: 26 % less output error on the layers of the trained diffusion model, no difference on others.
    """
    return damping * diagonal.clamp(min=1e-6 * float(diagonal.mean()))


def factor(hessian: Tensor, order: Tensor, damping: float, poll: Callable[[], None]) -> Factor | None:
    """float32 [K, K], symmetric, >= 0 -> its factor with `damped` added to the diagonal; None when it is not definite.

    Works from the last panel to the first (left-looking), so H is read, never copied whole.
    """
    k = hessian.shape[0]
    added = damped(hessian.diagonal(), damping)[order]
    starts = list(range(0, k, PANEL))
    roots: list[Tensor] = [hessian] * len(starts)  # V = U sqrt(D); every entry is replaced before it is read
    failed = torch.zeros((), dtype=torch.int32, device=hessian.device)
    for p in reversed(range(len(starts))):
        poll()
        start, stop = starts[p], min(starts[p] + PANEL, k)
        panel = hessian[order[:stop, None], order[None, start:stop]]
        panel[start:].diagonal().add_(added[start:stop])
        for later in roots[p + 1 :]:
            panel.addmm_(later[:stop], later[start:stop].T, alpha=-1)
        # The upper root of a block is the flipped lower root of the flipped block.
        lower, info = torch.linalg.cholesky_ex(panel[start:].flip(0, 1))
        failed = torch.maximum(failed, info)
        root = lower.flip(0, 1)
        above = torch.linalg.solve_triangular(root.T, panel[:start], upper=False, left=False)
        roots[p] = torch.cat([above, root])
    if int(failed) != 0:
        return None
    diagonals = [root[start:].diagonal().clone() for root, start in zip(roots, starts, strict=True)]
    for p, diagonal in enumerate(diagonals):
        roots[p][starts[p] :].fill_diagonal_(0)
        roots[p] = roots[p].div_(diagonal).half()
    pivots = torch.cat(diagonals).square_()
    finite = torch.stack([root.isfinite().all() for root in roots]).all()
    return Factor(order, roots, pivots, damping) if bool(finite) else None
