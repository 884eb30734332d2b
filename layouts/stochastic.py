"""Stochastic rounding: between the two neighbours on the grid, with the probability that keeps the mean."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant_core.formats.base import Format
from ..quant_core.numerics.scales import QParams

_CHUNK_WEIGHTS = 1 << 24  # bounds the temporaries, about six float32 each


def stochastic_codes(fmt: Format, work: Tensor, qp: QParams, seed: int) -> Tensor:
    """float32 [Np, Kp] -> codes. The mean over seeds is the weight itself, for every grid, within the grid's range.

    seed: 1 .. 2**64 - 1; the same seed, weight and device type give the same codes.
    """
    n, k = work.shape
    generator = torch.Generator(device=work.device).manual_seed(seed)
    chosen = torch.empty_like(work)
    step = max(1, _CHUNK_WEIGHTS // n)
    for start in range(0, k, step):
        columns = work[:, start : start + step]
        lo, hi = fmt.bracket_columns(columns, qp, start, (n, k))
        dice = torch.rand(columns.shape, generator=generator, device=work.device)
        chosen[:, start : start + step] = torch.where(dice * (hi - lo) < columns - lo, hi, lo)
    return fmt.encode(chosen, qp)
