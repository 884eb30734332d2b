"""Percentiles of |x| from a histogram with fixed edges: merging two is adding their counts."""

from __future__ import annotations

import torch
from torch import Tensor

# The edges are read off the bits of a float32: 32 equal bins in every octave from 2**-40 to 2**24.
_BINS_PER_OCTAVE_LOG2 = 5
_LOWEST_EXPONENT, _OCTAVES = -40, 64
BINS = _OCTAVES << _BINS_PER_OCTAVE_LOG2
_MANTISSA_BITS, _EXPONENT_BIAS = 23, 127
_SHIFT = _MANTISSA_BITS - _BINS_PER_OCTAVE_LOG2
_FIRST_BIN = (_LOWEST_EXPONENT + _EXPONENT_BIAS) << _BINS_PER_OCTAVE_LOG2

RELATIVE_ERROR = 2.0 ** -(_BINS_PER_OCTAVE_LOG2 + 1)
"""A bin is at most 1/32 of its lower edge wide and its middle is reported, so a percentile is off by 1/64 at most."""


def new_histogram(device: torch.device | str) -> Tensor:
    """int64 [BINS], all zero."""
    return torch.zeros(BINS, dtype=torch.int64, device=device)


def count_into(histogram: Tensor, x: Tensor) -> None:
    """Add the magnitudes of x (float32, any shape, finite) to the counts, in place and without a sync.

    Magnitudes below 2**-40, zeros included, fall into the first bin; those of 2**24 and more into the last.
    """
    bins = ((x.reshape(-1).contiguous().view(torch.int32) & 0x7FFFFFFF) >> _SHIFT).clamp_(
        _FIRST_BIN, _FIRST_BIN + BINS - 1
    )
    if x.device.type in ("cpu", "mps"):
        histogram += torch.bincount(bins - _FIRST_BIN, minlength=BINS)
    else:  # bincount would wait for the largest value; histc counts in shared memory, integers exactly
        histogram += torch.histc(bins, BINS, _FIRST_BIN, _FIRST_BIN + BINS)


def edges() -> Tensor:
    """Lower edges of the bins and the upper edge of the last: float64 [BINS + 1]."""
    bits = (torch.arange(BINS + 1, dtype=torch.int32, device="cpu") + _FIRST_BIN) << _SHIFT
    return bits.view(torch.float32).double()


def percentile(histogram: Tensor, percent: float, absmax: float) -> float:
    """The magnitude that `percent` (0 to 100) of the counted ones do not exceed, within RELATIVE_ERROR.

    absmax: the true largest magnitude, returned for 100 and never exceeded. 0 for an empty histogram.
    """
    total = int(histogram.sum())
    if percent >= 100.0:
        return absmax
    if total == 0:
        return 0.0
    below = histogram.cpu().cumsum(0)
    index = int(torch.searchsorted(below, max(1.0, percent / 100.0 * total)))
    at = edges()
    middle = 0.0 if index == 0 else float(at[index] + at[index + 1]) / 2
    return min(middle, absmax)
