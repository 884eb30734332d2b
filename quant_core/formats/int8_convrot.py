"""INT8 per row in a rotated basis: outlier input channels are spread over their group before rounding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..numerics.elements import INT8
from ..numerics.scales import Granularity
from .families.rotated import RotatedFormat
from .int8_tensorwise import INT8_RUNTIME, INT8_SOURCE, Int8TensorwiseFamily


@dataclass(frozen=True, kw_only=True)
class Int8ConvRot(RotatedFormat, Int8TensorwiseFamily):
    def config(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        return {**super().config(shape, dtype), "convrot": True, "convrot_groupsize": self.rotation, "per_row": True}

    def runtime_params(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**super().runtime_params(tensors), "convrot": True}


FORMAT = Int8ConvRot(
    name="int8_convrot",
    on_disk="int8_tensorwise",
    title="INT8 per row, rotated (ConvRot)",
    element=INT8,
    granularity=Granularity.ROW,
    scale_rank="column",
    rotation=256,
    rotations=(16, 64, 256, 1024),
    runtime=INT8_RUNTIME,
    error_bound=0.5 / 127 + 1e-5,
    source=INT8_SOURCE,
)
