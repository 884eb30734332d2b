"""Bias correction: moves the mean output error of a quantized layer into its bias."""

from __future__ import annotations

import torch
from torch import Tensor

from .evidence import Evidence

_ROWS = 4096


def can_correct(evidence: Evidence) -> bool:
    """Whether the mean is known, and rows to judge it by."""
    return evidence.mean is not None and evidence.rows is not None


def correct_bias(bias: Tensor, error: Tensor, evidence: Evidence) -> tuple[Tensor | None, str | None]:
    """b + E[x] (W - Wq)^T, in bias's dtype, and None; or None and why it is left as it is.

    bias: [N]. error: float32 [N, K], W - Wq. The mean comes from the calibration rows. It is used only where it lowers
    the output error on the rows held out, which had no part in the mean.
    """
    if evidence.mean is None or evidence.rows is None:
        return None, None
    shift = error @ evidence.mean.to(error.device, torch.float32)
    corrected = (bias.to(torch.float32) + shift).to(bias.dtype)
    moved = corrected.to(torch.float32) - bias.to(torch.float32)  # what is left of it in the bias's dtype
    before = after = 0.0
    for start in range(0, evidence.rows.shape[0], _ROWS):
        missing = evidence.rows[start : start + _ROWS].to(error.device, torch.float32) @ error.T
        before += float(missing.square().sum(dtype=torch.float64))
        after += float((missing - moved).square().sum(dtype=torch.float64))
    if after < before:
        return corrected, None
    return None, "bias correction would raise the error on held-out inputs, the bias was left as it is"
