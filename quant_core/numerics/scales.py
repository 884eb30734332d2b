"""Granularity (which weights share a scale), and what turns codes back into weights.

A scale always MULTIPLIES on decode. Scales live as float32 [NB, KB], one per block of the work weight;
`ScaleDtype.snap` moves them to what the stored dtype can represent, so that rounding sees the reader's scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Below this a scale would be subnormal on some devices (flushed to zero on GPUs) or its reciprocal Inf.
# Equal to comfy-kitchen's floor for int8, so that bytes agree; weights this small become zeros.
SCALE_FLOOR = 1e-30


class Granularity(Enum):
    """Which weights share one scale. `group_size` is the block side where there is one."""

    TENSOR = "tensor"  # one scale
    ROW = "row"  # one per output channel
    GROUP = "group"  # one per row and group_size input channels
    BLOCK = "block"  # one per group_size x group_size tile

    def block(self, shape: tuple[int, int], group_size: int | None) -> tuple[int, int]:
        """(rows, columns) of the weights that share a scale, for a work weight of `shape`."""
        if self is Granularity.TENSOR:
            return shape
        if self is Granularity.ROW:
            return 1, shape[1]
        if group_size is None:
            raise ValueError(f"one scale per {self.value} needs a group size")
        return (1, group_size) if self is Granularity.GROUP else (group_size, group_size)

    def grid(self, shape: tuple[int, int], group_size: int | None) -> tuple[int, int]:
        """(NB, KB): how many scales along rows and columns."""
        rows, cols = self.block(shape, group_size)
        return shape[0] // rows, shape[1] // cols


def shape_of(matrix: Tensor) -> tuple[int, int]:
    """[N, K] of a tensor with two dimensions."""
    n, k = matrix.shape
    return n, k


def given(part: T | None) -> T:
    """A part that some formats do without, of one that has it."""
    if part is None:
        raise ValueError("the format needs a part of its parameters that is not there")
    return part


def divide(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, correctly rounded on every device.

    CUDA multiplies by the reciprocal of a Python number, which can be an ulp off.
    """
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


@dataclass(frozen=True, slots=True)
class QParams:
    """Everything but the codes: what turns codes back into weights.

    scale: float32 [NB, KB], exactly as the stored dtype represents it, without the parent.
    parent: float32, () or [NB, 1]: multiplies `scale` (NVFP4's weight_scale_2, W4A8's weight_s_channel).
    zero: float32 [NB, KB], added after scaling (AWQ). codebook: float32 [16], when the format stores its own.
    """

    scale: Tensor
    parent: Tensor | None = None
    zero: Tensor | None = None
    codebook: Tensor | None = None

    def effective(self) -> Tensor:
        """float32 [NB, KB]: what one unit of an element is worth."""
        return self.scale if self.parent is None else self.scale * self.parent

    def rows(self, blocks: slice) -> QParams:
        """The part that belongs to some rows of blocks."""
        cut = lambda t: t if t is None or t.dim() < 2 else t[blocks]  # noqa: E731
        return QParams(self.scale[blocks], cut(self.parent), cut(self.zero), self.codebook)

    def to(self, device: torch.device | str) -> QParams:
        move = lambda t: None if t is None else t.to(device)  # noqa: E731
        return QParams(self.scale.to(device), move(self.parent), move(self.zero), move(self.codebook))


def block_view(work: Tensor, block: tuple[int, int]) -> Tensor:
    """[N, K] -> view [NB, bn, KB, bk]; scales [NB, KB] broadcast over it as scale[:, None, :, None]."""
    n, k = work.shape
    rows, cols = block
    return work.view(n // rows, rows, k // cols, cols)


def block_absmax(work: Tensor, block: tuple[int, int]) -> Tensor:
    """float32 [N, K] -> float32 [NB, KB]."""
    view = block_view(work, block)
    # amax then -amin reads the data twice without a full-size abs() copy: less memory traffic on a CPU.
    return torch.maximum(view.amax(dim=(1, 3)), -view.amin(dim=(1, 3))).abs_()  # abs: no -0 for a block of zeros
