"""The Params of our layouts: what a QuantizedTensor carries beside its codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy_kitchen.tensor import BaseLayoutParams
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PlainParams(BaseLayoutParams):
    """scale: float32 in the shape stored on disk. orig_dtype: the dtype the tensor shows, always a float.

    orig_shape: the shape the tensor shows; while `transposed`, the reverse of the stored [N, K].
    group_size: 0 where the format has none.
    Checked at every rebuild (offloading rebuilds it often), so the checks touch no data.
    """

    group_size: int = 0
    transposed: bool = False

    def _validate_tensor_fields(self) -> None:
        if not self.orig_dtype.is_floating_point:
            # Dequantizing to uint8 is what once ended in "mat1 and mat2 to have the same dtype ... unsigned char".
            raise TypeError(
                f"orig_dtype is {self.orig_dtype}: it is the dtype of the dequantized weight (bfloat16, "
                "float16 or float32), never that of the stored codes."
            )
        for name in self._tensor_fields():
            field = getattr(self, name)
            if not isinstance(field, Tensor) or field.dtype is not torch.float32 or not field.is_contiguous():
                found = (
                    f"{field.dtype}, strides {field.stride()}" if isinstance(field, Tensor) else type(field).__name__
                )
                raise TypeError(f"{name} is {found}: it must be a contiguous float32 tensor.")


@dataclass(frozen=True, kw_only=True)
class CodebookParams(PlainParams):
    """codebook: float32 [16], in code order."""

    codebook: Tensor

    def _tensor_fields(self) -> list[str]:
        return ["scale", "codebook"]
