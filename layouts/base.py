"""One QuantizedTensor layout for all our formats: everything particular comes from the engine's Format object."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor
from torch import Tensor

from ..quant_core.errors import RequestError
from ..quant_core.formats.base import Format
from ..quant_core.numerics.scales import QParams, shape_of
from . import linear, torch_ops
from .params import PlainParams
from .stochastic import stochastic_codes


class QuantPressLayout(QuantizedLayout):
    """Base of the layouts; registry.py makes one subclass per format. FORMAT: with its default group size.

    Never subclass QuantizedTensor for them: comfy wraps weights as Parameters, which only the base class survives.
    """

    FORMAT: ClassVar[Format]
    Params: ClassVar[type[PlainParams]]

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: Tensor | float | str | None = None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        group_size: int | None = None,
        codebook: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, PlainParams]:
        """float [N, K] -> (codes, Params), in the geometry of the group size whatever the values are.

        scale: None or "recalculate" takes each group's absmax; a number or a tensor (one value, or one per group in
        any shape) is used as it is. stochastic_rounding: a seed up to 2**64 - 1; 0 and None round to nearest.
        inplace_ops and other keywords are what comfy passes to every layout; the input is never written to.
        codebook: float32 [16], when a file brought its own; reading it waits for its device.
        Raises RequestError when the shape does not fit the format.
        """
        fmt = cls._format(group_size, codebook)
        shape = tuple(tensor.shape)
        problem = fmt.misfit(shape)
        if problem:
            raise RequestError(f"a weight cannot be quantized: {problem}. Leave the layer unquantized.")
        work = fmt.prepare(tensor.detach().to(torch.float32).contiguous())
        qp = cls._qparams(fmt, work, scale)
        codes = stochastic_codes(fmt, work, qp, stochastic_rounding) if stochastic_rounding else fmt.encode(work, qp)
        stored = fmt.pack(codes, qp, shape_of(tensor))
        return stored["weight"], cls.params_of(stored, shape, tensor.dtype, fmt.group_size)

    @classmethod
    def _format(cls, group_size: int | None, codebook: Tensor | None) -> Format:
        fmt = linear.variant(cls.FORMAT.name, group_size or 0)
        return fmt if codebook is None else fmt.with_codebook(codebook)

    @staticmethod
    def _qparams(fmt: Format, work: Tensor, scale: Tensor | float | str | None) -> QParams:
        if scale is None or (isinstance(scale, str) and scale == "recalculate"):
            return fmt.absmax(work)
        grid = fmt.scale_grid(shape_of(work))
        given = torch.as_tensor(scale, dtype=torch.float32, device=work.device)
        if given.numel() not in (1, grid[0] * grid[1]):
            raise RequestError(
                f"{fmt.name}: a scale of shape {list(given.shape)} was given for a weight of shape "
                f"{list(work.shape)}: it needs one value, or {grid[0]} x {grid[1]}."
            )
        return fmt.qparams(given.reshape(grid if given.numel() > 1 else (1, 1)).expand(grid).contiguous())

    @classmethod
    def params_of(
        cls, stored: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, group_size: int | None
    ) -> PlainParams:
        """Params from a layer's tensors as on disk. float32 contiguous tensors keep their storage."""
        extra: dict[str, Any] = {}
        if "weight_codebook" in stored:
            extra["codebook"] = stored["weight_codebook"].to(torch.float32).contiguous()
        return cls.Params(
            scale=stored["weight_scale"].to(torch.float32).contiguous(),
            orig_dtype=dtype,
            orig_shape=tuple(shape),
            group_size=group_size or 0,
            **extra,
        )

    @classmethod
    def dequantize(cls, qdata: Tensor, params: PlainParams) -> Tensor:
        """The stored [N, K] in params.orig_dtype (QuantizedTensor itself transposes it where that is asked)."""
        return torch_ops.dequantize(cls.FORMAT.name, qdata, params, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        """(codes, scale) or (codes, scale, codebook)."""
        params = qtensor._params
        return (qtensor._qdata, *(getattr(params, name) for name in params._tensor_fields()))

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: PlainParams) -> dict[str, Tensor]:
        """{"": codes, "_scale": ..., "_codebook": ...}: appended to `<layer>.weight` they are the names on disk."""
        return {"": qdata, **{f"_{name}": getattr(params, name) for name in params._tensor_fields()}}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """What keeps the geometry and the grid when a LoRA is baked in."""
        params = qtensor._params
        kwargs: dict[str, Any] = {"group_size": params.group_size or None}
        codebook = getattr(params, "codebook", None)
        return kwargs if codebook is None else {**kwargs, "codebook": codebook}

    @classmethod
    def get_logical_shape_from_storage(cls, storage_shape: tuple[int, ...]) -> tuple[int, ...]:
        """[N, K] of codes stored as [N, K] or, two to a byte, as [N, K / 2]."""
        return (*storage_shape[:-1], storage_shape[-1] * (8 // cls.FORMAT.element.bits))
