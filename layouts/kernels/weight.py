"""A layer's stored weight as the kernels see it, whatever the format: codes, a grid of scales, perhaps a codebook."""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...quant_core.format import Format


@dataclass(frozen=True, slots=True)
class Weight:
    """codes: fp8 or int8 [N, K], or uint8 [N, K / 2] with the even column in the high nibble; contiguous.

    scale: float32 [NB, KB]; one per group_rows x group_cols weights. codebook: float32 [16] for nibbles.
    kind: "fp8", "int8" or "nibble".
    """

    kind: str
    codes: Tensor
    scale: Tensor
    codebook: Tensor | None
    shape: tuple[int, int]
    group_rows: int
    group_cols: int

    @property
    def whole_row(self) -> bool:
        """One scale serves all columns of a row."""
        return self.group_cols == self.shape[1]

    @property
    def group_constant(self) -> int:
        """group_cols as the kernels compile it in; 1 where unused, so that K is no reason to compile again."""
        return 1 if self.whole_row else self.group_cols


@lru_cache(maxsize=64)
def kind_of(fmt: Format) -> str:
    """How one code of the format is decoded by the kernels."""
    return {(8, torch.float8_e4m3fn): "fp8", (8, torch.int8): "int8", (4, torch.uint8): "nibble"}[
        fmt.element.bits, fmt.element.dtype]


def weight_of(fmt: Format, codes: Tensor, scale: Tensor, codebook: Tensor | None, shape: tuple[int, int]) -> Weight:
    """fmt: with the layer's group size. scale: in the shape stored on disk. Copies nothing when contiguous."""
    rows, cols = fmt.block(shape)
    return Weight(kind_of(fmt), codes.contiguous(), scale.reshape(fmt.scale_grid(shape)).contiguous(), codebook,
                  shape, rows, cols)


def decoded(weight: Weight) -> Tensor:
    """Specification: float32 [N, K], element value times scale."""
    n, k = weight.shape
    if weight.kind == "nibble":
        pairs = torch.stack((weight.codes >> 4, weight.codes & 15), dim=-1).reshape(n, k)
        values = weight.codebook[pairs.to(torch.int32)]
    else:
        values = weight.codes.to(torch.float32)
    view = values.view(n // weight.group_rows, weight.group_rows, k // weight.group_cols, weight.group_cols)
    return (view * weight.scale[:, None, :, None]).view(n, k)
