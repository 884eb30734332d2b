"""Formats stored as one code per weight (no packing, no padding) beside one tensor of scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...checkpoint.header import TORCH_TO_CODE, TensorInfo
from ...numerics.scales import Granularity, QParams
from ..base import Format
from ..records import TensorSpec

Self = TypeVar("Self", bound="PlainFormat")
_FLOATS = ("F32", "F16", "BF16", "F64")


def _sharing(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[Granularity | None, int | None]:
    """Which weights share a scale, and the group size where there is one; (None, None) where no rule fits."""
    rows, cols = weight
    if all(size == 1 for size in scale):
        return Granularity.TENSOR, None
    if scale in ((rows,), (rows, 1)):
        return Granularity.ROW, None
    if len(scale) in (2, 3) and scale[1] and cols % scale[1] == 0 and scale[2:] in ((), (1,)):
        group = cols // scale[1]
        if scale[0] == rows:
            return Granularity.GROUP, group
        if len(scale) == 2 and scale[0] * group == rows:
            return Granularity.BLOCK, group
    return None, None


@dataclass(frozen=True, kw_only=True)
class PlainFormat(Format):
    """weight [N, K] of the element's dtype; weight_scale float32.

    scale_rank: how the scales [NB, KB] are shaped on disk: "scalar" (), "vector" (N,), "column" (N, 1),
    "grid" (NB, KB), "grid3d" (NB, KB, 1).
    reciprocal: encode multiplies by 1 / scale instead of dividing, where the reference encoder does.
    unit_input_scale: `input_scale` 1.0 is always written beside it (readers of int8_blockwise expect it).
    """

    scale_rank: str = "scalar"
    reciprocal: bool = False
    unit_input_scale: bool = False
    records_group_size: bool = False

    def _stored_scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        rows, cols = self.scale_grid(shape)
        return {"scalar": (), "vector": (rows,), "column": (rows, 1), "grid": (rows, cols), "grid3d": (rows, cols, 1)}[
            self.scale_rank
        ]

    def tensor_specs(self, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        specs = (
            TensorSpec("weight", self.element.dtype, tuple(shape)),
            TensorSpec("weight_scale", torch.float32, self._stored_scale_shape(shape)),
        )
        return specs + (
            (TensorSpec("input_scale", torch.float32, (), optional=True),) if self.unit_input_scale else ()
        )

    def config(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        config = super().config(shape, dtype)
        if self.records_group_size:
            config["group_size"] = self.group_size
        return config

    def _to_units(self, view: Tensor, scale: Tensor) -> Tensor:
        return view * scale.reciprocal() if self.reciprocal else view / scale

    def pack(self, codes: Tensor, qp: QParams, shape: tuple[int, int]) -> dict[str, Tensor]:
        tensors = {"weight": codes, "weight_scale": qp.scale.reshape(self._stored_scale_shape(shape)).contiguous()}
        if self.unit_input_scale:
            tensors["input_scale"] = torch.ones((), dtype=torch.float32, device=codes.device)
        return tensors

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, QParams]:
        scale = tensors["weight_scale"].to(torch.float32)
        return tensors["weight"], QParams(scale.reshape(self.scale_grid(shape)))

    def recognise(self, infos: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        weight, scale = infos["weight"], infos.get("weight_scale")
        if weight.dtype != TORCH_TO_CODE[self.element.dtype] or scale is None or scale.dtype not in _FLOATS:
            return None
        granularity, group = _sharing(weight.shape, scale.shape)
        if granularity is not self.granularity or (len(scale.shape) == 3 and group and self.scale_rank != "grid3d"):
            return None
        return replace(self, group_size=group).config((weight.shape[0], weight.shape[1]), torch.float32)

    def accepts(self: Self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Self | None:
        fmt = super().accepts(config, shapes)
        weight, scale = shapes["weight"], shapes.get("weight_scale")
        if fmt is None or scale is None or len(weight) != 2:
            return None
        if bool(config.get("convrot")) != (self.rotation is not None):
            return None
        if self.granularity is Granularity.TENSOR:
            return fmt if scale in ((), (1,)) else None
        if fmt.group_size is not None:
            rows, cols = fmt.block((weight[0], weight[1]))
            if weight[0] % rows or weight[1] % cols:
                return None
        return fmt if scale == fmt._stored_scale_shape(weight) else None
