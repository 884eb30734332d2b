"""A layer's stored weight as the kernels see it, whatever the format: codes, a grid of scales, perhaps a codebook."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant_core.formats.base import Format
from ...quant_core.numerics.scales import given


@dataclass(frozen=True, slots=True)
class Geometry:
    """shape: [N, K]. grid: [NB, KB], how many scales; one per group_rows x group_cols weights.

    kind: how a code is decoded: "fp8" or "int8", one code per byte, or "nibble", two, the even column in the high one.
    """

    kind: str
    shape: tuple[int, int]
    grid: tuple[int, int]
    group_rows: int
    group_cols: int

    @property
    def whole_row(self) -> bool:
        """One scale serves all columns of a row."""
        return self.group_cols == self.shape[1]

    @property
    def group_constant(self) -> int:
        """group_cols as the kernels compile it in; 1 where unused, so that K is not a reason to compile again."""
        return 1 if self.whole_row else self.group_cols


def geometry_of(fmt: Format, shape: tuple[int, int]) -> Geometry | None:
    """None for a format without kernels. fmt: with the layer's own group size."""
    kind = fmt.runtime.kernel
    return None if kind is None else Geometry(kind, shape, fmt.scale_grid(shape), *fmt.block(shape))


@dataclass(frozen=True, slots=True)
class Weight:
    """codes: fp8 or int8 [N, K], or uint8 [N, K / 2]. scale: float32, the grid in any shape. codebook: float32 [16].

    All contiguous and on one device.
    """

    geometry: Geometry
    codes: Tensor
    scale: Tensor
    codebook: Tensor | None


def decoded(weight: Weight) -> Tensor:
    """Specification: float32 [N, K], element value times scale."""
    g = weight.geometry
    n, k = g.shape
    if g.kind == "nibble":
        pairs = torch.stack((weight.codes >> 4, weight.codes & 15), dim=-1).reshape(n, k)
        values = given(weight.codebook)[pairs.to(torch.int32)]
    else:
        values = weight.codes.to(torch.float32)
    view = values.view(n // g.group_rows, g.group_rows, k // g.group_cols, g.group_cols)
    return (view * weight.scale.view(g.grid)[:, None, :, None]).view(n, k)


_HERE: AbstractContextManager = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current GPU. Entering a device costs microseconds, so only where it is another one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _HERE
