"""What calibration knows of a layer's inputs, as choosers and rounders take it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Evidence:
    """What calibration knows of a layer's inputs x [rows, K]. Every field may be missing.

    hessian: float32 [K, K], X^T X / rows. hessian_diagonal: float32 [K], the mean square per channel.
    mean: float32 [K]. absmax: float32 [K]. rows: bf16 or float32 [R, K], held out, for judging only.
    count: how many rows were seen. centre: make_objective takes the mean out of the Hessian and of its diagonal.
    """

    hessian: Tensor | None = None
    hessian_diagonal: Tensor | None = None
    mean: Tensor | None = None
    absmax: Tensor | None = None
    rows: Tensor | None = None
    count: int = 0
    centre: bool = False

    def centred(self) -> Evidence:
        """Of x - mean: what counts once the bias has taken up the mean error."""
        return replace(self, centre=True)
