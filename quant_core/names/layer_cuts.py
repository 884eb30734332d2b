"""Other names of a layer, and which of its rows each stands for: q, k and v are one weight in some models."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Cut(Enum):
    """Which rows of a layer another name stands for."""

    ALL = "all"
    SWAPPED = "swapped"  # all; the halves exchanged where there are two, as the scale and shift of the last blocks are
    Q = "q"
    K = "k"
    V = "v"
    REST = "rest"  # what stands behind q, k and v
    QKV = "qkv"  # what stands before the rest
    FIRST = "first"  # halves of a joined k and v
    SECOND = "second"

    def rows(self, shape: tuple[int, ...]) -> slice:
        """shape: of the layer's weight, [out_features, in_features, ...].

        q has as many rows as the weight has inputs, unless q, k and v are thirds. With an MLP behind them (Flux's
        linear1) all three have that many; without one, k and v share what is left (grouped queries).
        """
        n = shape[0]
        if self in (Cut.ALL, Cut.SWAPPED):
            return slice(0, n)
        if self in (Cut.FIRST, Cut.SECOND):
            return slice(0, n // 2) if self is Cut.FIRST else slice(n // 2, n)
        q = shape[1] if len(shape) > 1 and shape[1] < n else n // 3
        k = q if n >= 3 * q else (n - q) // 2
        bounds = {Cut.Q: (0, q), Cut.K: (q, q + k), Cut.V: (q + k, q + 2 * k)}
        bounds |= {Cut.QKV: (0, q + 2 * k), Cut.REST: (q + 2 * k, n)}
        return slice(*bounds[self])


@dataclass(frozen=True, slots=True)
class Alias:
    """name: of the layer elsewhere. cut: the rows it stands for."""

    name: str
    cut: Cut = Cut.ALL
