"""bitsandbytes-type formats: 4-bit codes into a codebook, one float32 absmax per group of input channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...numerics.elements import CodebookElement
from ...numerics.packing import pack_nibbles, unpack_nibbles
from ...numerics.ranks import look_up
from ...numerics.scales import QParams
from ..base import Format
from ..records import TensorSpec

Self = TypeVar("Self", bound="CodebookFormat")
_SMALLEST_DIVISOR = 1e-38  # as bitsandbytes divides: blocks of zeros and of subnormals stay finite
DTYPE_NAMES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}


@dataclass(frozen=True, kw_only=True)
class CodebookFormat(Format):
    """weight uint8 [N, K / 2], the HIGH nibble being the even column; weight_scale float32 [N, K / group_size];
    weight_codebook float32 [16].

    group_size divides K, so the groups are those of bitsandbytes' flat blocks and the bytes agree.
    A group of zeros gets absmax 0 and the code of 0.
    """

    element: CodebookElement

    def tensor_specs(self, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        n, k = shape
        return (
            TensorSpec("weight", torch.uint8, (n, k // 2)),
            TensorSpec("weight_scale", torch.float32, self.scale_grid(shape), signed=self.signed_scales),
            TensorSpec("weight_codebook", torch.float32, (16,), row_axis=None, optional=True, signed=True),
        )

    def config(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        return {
            **super().config(shape, dtype),
            "group_size": self.group_size,
            "quant_type": self.quant_type,
            "dtype": DTYPE_NAMES.get(dtype, "float32"),
            "shape": list(shape),
        }

    def codebook(self, device: torch.device | str = "cpu") -> Tensor:
        """float32 [16], in code order."""
        return torch.tensor(self.element.table, dtype=torch.float32, device=device)

    def qparams(self, effective: Tensor, like: QParams | None = None) -> QParams:
        return QParams(effective)

    def _to_units(self, view: Tensor, scale: Tensor) -> Tensor:
        divisor = torch.where(scale < 0, scale.clamp(max=-_SMALLEST_DIVISOR), scale.clamp(min=_SMALLEST_DIVISOR))
        return view * divisor.reciprocal()

    def pack(self, codes: Tensor, qp: QParams, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {
            "weight": pack_nibbles(codes, high_first=True),
            "weight_scale": qp.scale.contiguous(),
            "weight_codebook": self.codebook(codes.device),
        }

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, QParams]:
        return (
            unpack_nibbles(tensors["weight"], high_first=True),
            QParams(
                tensors["weight_scale"].to(torch.float32).reshape(self.scale_grid(shape)),
                codebook=tensors["weight_codebook"].to(torch.float32),
            ),
        )

    def decode(self, codes: Tensor, qp: QParams) -> Tensor:
        """As the base; a codebook read from a file is used, not assumed."""
        if qp.codebook is None:
            return super().decode(codes, qp)
        n, k = codes.shape
        values = look_up(qp.codebook, codes).view(n, -1, self.group)
        return (values * qp.effective()[..., None]).view(n, k)

    def with_codebook(self: Self, table: Tensor) -> Self:
        if torch.equal(table.cpu(), self.codebook()):
            return self
        return replace(self, element=CodebookElement("from the file", tuple(table.tolist())))
