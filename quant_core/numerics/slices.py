"""A matrix a few rows at a time, so that the data stays in a CPU's cache, or temporaries stay small."""

from __future__ import annotations

from collections.abc import Iterator

from ..cancel import poll


def row_slices(shape: tuple[int, int], weights: int, unit: int = 1) -> Iterator[slice]:
    """Slices of at most `weights` numbers, but of one unit of rows at least. Cancellable between them."""
    rows, cols = shape
    step = max(1, weights // (cols * unit)) * unit
    for start in range(0, rows, step):
        poll()
        yield slice(start, min(start + step, rows))
