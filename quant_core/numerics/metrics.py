"""Errors of a quantized weight or output against its reference."""

from __future__ import annotations

import math

from torch import Tensor


def relative_error(reference: Tensor, approximation: Tensor) -> float:
    """||a - r||_F / ||r||_F, both any shape; 0 when both are zero, inf when only the reference is."""
    reference, approximation = reference.float(), approximation.float()
    norm, error = float(reference.norm()), float((approximation - reference).norm())
    largest = float(reference.abs().max()) if math.isinf(norm) or math.isinf(error) else math.inf
    if math.isfinite(largest):  # the squares left float32's range, the values did not
        norm = float((reference / largest).norm())
        error = float((approximation / largest - reference / largest).norm())
    if norm == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / norm


def snr_db(relative: float) -> float:
    """Signal-to-noise ratio in dB of a relative error; inf for an exact copy."""
    return math.inf if relative == 0.0 else -20.0 * math.log10(relative)
