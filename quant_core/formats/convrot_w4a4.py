"""ConvRot W4A4: signed int4 weights per row in a rotated basis; the runtime quantizes activations to int4 too."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..numerics.elements import INT4
from ..numerics.packing import pack_nibbles, sign_extend_nibbles, unpack_nibbles
from ..numerics.scales import Granularity, QParams, divide
from .families.rotated import RotatedFormat
from .records import Runtime, TensorSpec

_ABSMAX_FLOOR = 1e-10  # as the reference writes rows of zeros


@dataclass(frozen=True, kw_only=True)
class ConvRotW4A4(RotatedFormat):
    """A row of zeros gets the scale 1e-10 / 7 and codes 0."""

    def tensor_specs(self, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        n, k = shape
        return TensorSpec("weight", torch.int8, (n, k // 2)), TensorSpec("weight_scale", torch.float32, (n,))

    def config(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        return {**super().config(shape, dtype), "convrot_groupsize": self.rotation}

    def absmax(self, work: Tensor) -> QParams:
        return QParams(divide(self._block_absmax(work).clamp(min=_ABSMAX_FLOOR), self.element.max))

    def qparams(self, effective: Tensor, like: QParams | None = None) -> QParams:
        return QParams(effective.clamp(min=_ABSMAX_FLOOR / self.element.max))

    def pack(self, codes: Tensor, qp: QParams, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {
            "weight": pack_nibbles(codes, high_first=False).view(torch.int8),
            "weight_scale": qp.scale.reshape(-1).contiguous(),
        }

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, QParams]:
        codes = sign_extend_nibbles(unpack_nibbles(tensors["weight"], high_first=False))
        return codes, QParams(tensors["weight_scale"].to(torch.float32).reshape(-1, 1))


FORMAT = ConvRotW4A4(
    name="convrot_w4a4",
    on_disk="convrot_w4a4",
    title="INT4 per row, rotated (ConvRot W4A4)",
    element=INT4,
    granularity=Granularity.ROW,
    rotation=256,
    rotations=(16, 64, 256, 1024),
    k_multiple=64,
    runtime=Runtime("TensorCoreConvRotW4A4Layout", native_since="0.29", min_capability=(7, 5), quantizes_input=True),
    error_bound=0.5 / 7 + 1e-5,
    source="comfy-kitchen quantize_convrot_w4a4_weight (eager), K a multiple of its int4 group 64",
)
