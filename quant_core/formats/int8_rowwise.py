"""INT8 with one scale per output channel: ComfyUI's `int8_tensorwise` with `per_row`."""

from dataclasses import dataclass
from typing import Any

import torch

from ..numerics.elements import INT8
from ..numerics.scales import Granularity
from .int8_tensorwise import INT8_RUNTIME, INT8_SOURCE, Int8TensorwiseFamily


@dataclass(frozen=True, kw_only=True)
class Int8Rowwise(Int8TensorwiseFamily):
    def config(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        return {**super().config(shape, dtype), "per_row": True}


FORMAT = Int8Rowwise(
    name="int8_rowwise",
    on_disk="int8_tensorwise",
    title="INT8 per row",
    element=INT8,
    granularity=Granularity.ROW,
    scale_rank="column",
    runtime=INT8_RUNTIME,
    error_bound=0.5 / 127 + 1e-5,
    source=INT8_SOURCE,
)
