"""AWQ W4A16: unsigned 4-bit codes with a scale and a zero point per 64 input channels; activations stay 16-bit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.header import TensorInfo
from ..numerics.elements import CodebookElement
from ..numerics.packing import pack_nibbles, unpack_nibbles
from ..numerics.scale_dtypes import SCALE_BF16
from ..numerics.scales import Granularity, QParams, divide, given
from .base import Format
from .records import ColumnGrid, KernelLimits, Runtime, TensorSpec

# value = (code - 8) * scale + zero
UINT4 = CodebookElement("uint4", tuple(float(v) for v in range(-8, 8)))
_SCALE_FLOOR = 1e-30


@dataclass(frozen=True, kw_only=True)
class AwqW4A16(Format):
    """The only format with a zero point: `work - zero` is what lies on the grid.

    A constant group gets scale 1e-30, that constant as its zero point, and code 8.
    """

    def tensor_specs(self, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        n, k = shape
        groups = k // self.group
        return (
            TensorSpec("weight", torch.int8, (n, k // 2)),
            TensorSpec("weight_scale", torch.bfloat16, (groups, n), row_axis=1),
            TensorSpec("weight_zeros", torch.bfloat16, (groups, n), row_axis=1, signed=True),
        )

    def config(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        return {**super().config(shape, dtype), "group_size": self.group_size}

    def absmax(self, work: Tensor) -> QParams:
        """Here min-max: code 0 lands on the group's smallest weight, code 15 on its largest."""
        view = self._block_view(work)
        low, high = view.amin(dim=(1, 3)), view.amax(dim=(1, 3))
        scale = SCALE_BF16.snap((divide(high, 15) - divide(low, 15)).clamp(min=_SCALE_FLOOR))
        # The middle of the 16 codes sits at -0.5: centre them on the group, so that bf16's rounding of the
        # zero point costs both ends the same.
        zero = SCALE_BF16.snap(low / 2 + high / 2 + scale / 2)
        return QParams(scale, zero=zero)

    def qparams(self, effective: Tensor, like: QParams | None = None) -> QParams:
        zero = (
            SCALE_BF16.snap(like.zero) if like is not None and like.zero is not None else torch.zeros_like(effective)
        )
        return QParams(SCALE_BF16.snap(effective.clamp(min=_SCALE_FLOOR)), zero=zero)

    def _zeros(self, qp: QParams, work: Tensor) -> Tensor:
        """float32 [Np, Kp]: every weight's zero point."""
        zero = given(qp.zero)[:, None, :, None]
        return zero.expand(self._block_view(work).shape).reshape(work.shape)

    def encode(self, work: Tensor, qp: QParams) -> Tensor:
        return super().encode(work - self._zeros(qp, work), qp)

    def decode(self, codes: Tensor, qp: QParams) -> Tensor:
        work = super().decode(codes, qp)
        return work + self._zeros(qp, work)

    def round_columns(self, columns: Tensor, qp: QParams, start: int, work_shape: tuple[int, int]) -> Tensor:
        zero = self._expand_columns(given(qp.zero), start, start + columns.shape[1], work_shape)
        return super().round_columns(columns - zero, qp, start, work_shape) + zero

    def bracket_columns(
        self, columns: Tensor, qp: QParams, start: int, work_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        zero = self._expand_columns(given(qp.zero), start, start + columns.shape[1], work_shape)
        lo, hi = super().bracket_columns(columns - zero, qp, start, work_shape)
        return lo + zero, hi + zero

    def levels(self, device: torch.device) -> Tensor | None:
        return None

    def column_grid(self, qp: QParams, columns: Tensor, work_shape: tuple[int, int]) -> ColumnGrid:
        zero = self._gather_columns(given(qp.zero), columns, work_shape)
        return replace(super().column_grid(qp, columns, work_shape), zero=zero)

    def recognise(self, infos: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        weight, scale = infos["weight"], infos.get("weight_scale")
        if "weight_zeros" not in infos or weight.dtype != "I8" or scale is None or len(scale.shape) != 2:
            return None
        groups = scale.shape[0]
        return {"format": self.on_disk, "group_size": weight.shape[1] * 2 // groups} if groups else None

    def runtime_params(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**super().runtime_params(tensors), "zeros": tensors["weight_zeros"], "group_size": self.group_size}

    def pack(self, codes: Tensor, qp: QParams, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {
            "weight": pack_nibbles(codes, high_first=False).view(torch.int8),
            "weight_scale": qp.scale.to(torch.bfloat16).T.contiguous(),
            "weight_zeros": given(qp.zero).to(torch.bfloat16).T.contiguous(),
        }

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, QParams]:
        scale, zero = (tensors[name].to(torch.float32).T.contiguous() for name in ("weight_scale", "weight_zeros"))
        return unpack_nibbles(tensors["weight"], high_first=False), QParams(scale, zero=zero)


FORMAT = AwqW4A16(
    name="awq_w4a16",
    on_disk="awq_w4a16",
    title="AWQ W4A16 (uint4 with zero point per 64)",
    element=UINT4,
    granularity=Granularity.GROUP,
    group_size=64,
    group_sizes=(64,),
    scale_dtype=SCALE_BF16,
    # comfy-kitchen 0.2.24 and 0.2.40: for 9 to 256 rows its kernel takes 64 for granted, others come out wrong
    runtime=Runtime("TensorCoreAWQW4A16Layout", native_since="0.30", limits=KernelLimits(group_sizes=(64,))),
    # half a step (1/15 of a range of at most twice absmax), bf16's rounding of scale (8 steps) and zero point
    error_bound=1 / 15 + 8 * (2 / 15) * 2.0**-8 + 2.0**-8 * 1.1 + 1e-5,
    source="comfy-kitchen TensorCoreAWQW4A16Layout (decoder; it has no encoder)",
)
