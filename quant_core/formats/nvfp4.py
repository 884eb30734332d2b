"""NVFP4: E2M1 elements, an E4M3 scale per 16 input channels, one float32 scale per tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.header import TensorInfo
from ..numerics.elements import E2M1
from ..numerics.packing import pack_nibbles, swizzle_scales, swizzled_shape, unpack_nibbles, unswizzle_scales
from ..numerics.scale_dtypes import SCALE_E4M3
from ..numerics.scales import SCALE_FLOOR, Granularity, QParams, divide, given
from .families.padded import PaddedBlockFormat
from .input_scale import Absent, InputScaleRule
from .records import KernelLimits, Runtime, TensorSpec

_LARGEST_SCALE = 448.0


@dataclass(frozen=True, kw_only=True)
class Nvfp4(PaddedBlockFormat):
    def tensor_specs(self, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        n, k = self.work_shape(shape)
        return (
            TensorSpec("weight", torch.uint8, (n, k // 2)),
            TensorSpec("weight_scale", torch.float8_e4m3fn, swizzled_shape(*self._unpadded_grid(shape))),
            TensorSpec("weight_scale_2", torch.float32, ()),
        )

    def absmax(self, work: Tensor) -> QParams:
        return self._absmax(work, None)

    def absmax_under(self, rows: Tensor, largest: Tensor) -> QParams:
        return self._absmax(rows, largest)

    def _absmax(self, work: Tensor, tensor_largest: Tensor | None) -> QParams:
        largest = self._block_absmax(work)
        tensor_largest = largest.max() if tensor_largest is None else tensor_largest
        # amax / (448 * 6) in one division, as the reference writes it; dividing twice can differ by an ulp.
        parent = divide(tensor_largest, _LARGEST_SCALE * self.element.max).clamp(min=SCALE_FLOOR)
        return self._under(divide(largest, self.element.max), parent)

    def qparams(self, effective: Tensor, like: QParams | None = None) -> QParams:
        if like is not None:
            return self._under(effective, given(like.parent))
        return self._under(effective, divide(effective.max(), _LARGEST_SCALE).clamp(min=SCALE_FLOOR))

    def _under(self, effective: Tensor, parent: Tensor) -> QParams:
        return QParams(self.scale_dtype.snap(effective / parent), parent)

    def recognise(self, infos: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        if "weight_scale_2" not in infos or "weight_scale" not in infos or infos["weight"].dtype != "U8":
            return None
        return {"format": self.on_disk} if infos["weight_scale"].dtype in ("U8", "F8_E4M3", "F8_E8M0") else None

    def modelopt_order_fits(self, infos: Mapping[str, TensorInfo]) -> bool:
        rows, half = infos["weight"].shape
        plain = (rows, half // 8)
        return plain == swizzled_shape(*plain) or infos["weight_scale"].shape != swizzled_shape(*plain)

    def runtime_params(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"scale": tensors["weight_scale_2"], "block_scale": tensors["weight_scale"].view(torch.float8_e4m3fn)}

    def pack(self, codes: Tensor, qp: QParams, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {
            "weight": pack_nibbles(codes, high_first=True),
            "weight_scale": swizzle_scales(self.scale_dtype.store(qp.scale)),
            "weight_scale_2": given(qp.parent).reshape(()).clone(),
        }

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, QParams]:
        stored = unswizzle_scales(tensors["weight_scale"], *self._unpadded_grid(shape))
        parent = tensors["weight_scale_2"].to(torch.float32).reshape(())
        return unpack_nibbles(tensors["weight"], high_first=True), QParams(self.scale_dtype.load(stored), parent)


FORMAT = Nvfp4(
    name="nvfp4",
    on_disk="nvfp4",
    title="NVFP4 (E2M1, E4M3 scale per 16)",
    element=E2M1,
    granularity=Granularity.GROUP,
    group_size=16,
    scale_dtype=SCALE_E4M3,
    pad_to=16,
    modelopt_differs=True,
    runtime=Runtime(
        "TensorCoreNVFP4Layout",
        native_since="0.8",
        min_capability=(10, 0),
        quantizes_input=True,
        input_scale=InputScaleRule(448.0 * 6.0, Absent.DYNAMIC),
        # comfy-kitchen 0.2.40 pads N to 16, and then torch refuses the bias
        limits=KernelLimits(n_multiple=16, of_quantized_inputs=True),
    ),
    # half the largest gap (2 of 6) under a scale that E4M3 moved by up to 1/16; small blocks round a subnormal scale
    error_bound=1 / 6 * (1 + 1 / 16) + 1e-5,
    tensor_bound=2.0**-10 / 448,
    source="NVIDIA NVFP4; encoder: comfy-kitchen quantize_nvfp4",
)
