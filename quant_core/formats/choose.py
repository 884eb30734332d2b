"""Which rotation group a layer takes: the format's own, or the largest that divides its inputs."""

from __future__ import annotations

from dataclasses import replace

from .base import Format


def with_largest_rotation(fmt: Format, in_features: int) -> Format:
    """`fmt` with the largest group it offers that divides in_features; itself when it does not rotate or none fits.

    A larger group spreads an outlier channel over more weights, and its rotation costs more on the inputs at run time.
    """
    fitting = [group for group in fmt.rotations if in_features % group == 0]
    return replace(fmt, rotation=max(fitting)) if fmt.rotation is not None and fitting else fmt
