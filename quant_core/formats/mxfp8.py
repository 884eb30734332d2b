"""MXFP8: E4M3 elements with a power-of-two scale per 32 input channels (OCP Microscaling)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.header import TensorInfo
from ..numerics.elements import E4M3
from ..numerics.packing import swizzle_scales, swizzled_shape, unswizzle_scales
from ..numerics.scale_dtypes import SCALE_E8M0
from ..numerics.scales import SCALE_FLOOR, Granularity, QParams
from .families.padded import PaddedBlockFormat
from .records import KernelLimits, Runtime, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Mxfp8(PaddedBlockFormat):
    def tensor_specs(self, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("weight", torch.float8_e4m3fn, self.work_shape(shape)),
            TensorSpec("weight_scale", torch.uint8, swizzled_shape(*self._unpadded_grid(shape))),
        )

    def qparams(self, effective: Tensor, like: QParams | None = None) -> QParams:
        scale = torch.where(effective > 0, effective.clamp(min=SCALE_FLOOR), torch.zeros_like(effective))
        return QParams(self.scale_dtype.snap(scale))

    def recognise(self, infos: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        weight, scale = infos["weight"], infos.get("weight_scale")
        if weight.dtype != "F8_E4M3" or scale is None or scale.dtype not in ("U8", "F8_E8M0"):
            return None
        rows, cols = weight.shape
        plain = (rows, cols // 32)
        return {"format": self.on_disk} if cols % 32 == 0 and scale.shape in (swizzled_shape(*plain), plain) else None

    def runtime_params(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"scale": tensors["weight_scale"].view(torch.float8_e8m0fnu)}

    def pack(self, codes: Tensor, qp: QParams, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {"weight": codes, "weight_scale": swizzle_scales(self.scale_dtype.store(qp.scale))}

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, QParams]:
        exponents = unswizzle_scales(tensors["weight_scale"].view(torch.uint8), *self._unpadded_grid(shape))
        return tensors["weight"], QParams(self.scale_dtype.load(exponents))


FORMAT = Mxfp8(
    name="mxfp8",
    on_disk="mxfp8",
    title="MXFP8 (E4M3, power-of-two scale per 32)",
    element=E4M3,
    granularity=Granularity.GROUP,
    group_size=32,
    scale_dtype=SCALE_E8M0,
    pad_to=32,
    runtime=Runtime(
        "TensorCoreMXFP8Layout",
        native_since="0.18",
        min_capability=(10, 0),
        quantizes_input=True,
        # comfy-kitchen 0.2.40 pads N to 32, and then torch refuses the bias
        limits=KernelLimits(n_multiple=32, of_quantized_inputs=True),
    ),
    error_bound=2 * 16 / 448 + 1e-5,  # a scale rounded up to a power of two is at most twice the wished one
    source="OCP Microscaling v1.0; encoder: comfy-kitchen quantize_mxfp8",
)
