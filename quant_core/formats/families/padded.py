"""Formats of the block-scaled matrix units (NVFP4, MXFP8): padded weights, swizzled scales, zero-scale blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..base import Format

Self = TypeVar("Self", bound="PaddedBlockFormat")


@dataclass(frozen=True, kw_only=True)
class PaddedBlockFormat(Format):
    """N and K are padded with zeros to `pad_to`; a block whose stored scale is 0 has codes 0 and decodes to 0."""

    def config(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        config = super().config(shape, dtype)
        if self.work_shape(shape) != tuple(shape):
            config["orig_shape"] = list(shape)  # ComfyUI takes it from the module; a reader of the file cannot
        return config

    def accepts(self: Self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Self | None:
        return self  # the block size is fixed; a recorded group_size changes nothing

    @property
    def row_multiple(self) -> int:
        return 128  # a tile of the swizzled scales

    def _to_units(self, view: Tensor, scale: Tensor) -> Tensor:
        empty = scale == 0
        units = view / torch.where(empty, torch.ones_like(scale), scale)
        return torch.where(empty, torch.zeros_like(units), units)

    def _unpadded_grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.scale_grid(self.work_shape(shape))
