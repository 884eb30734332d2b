"""The maths of a quantized linear layer, and of dequantizing: picks the kernel that the device and the shape call for.

On CUDA the fp8 and int8 formats also quantize the activations (per row, or per row and K group) once a call has
more than a few rows: that is where their speed comes from, and adds about the error of rounding the inputs to that
type. comfy-kitchen's int8 and fp8 layouts do the same. float32 inputs, and every other device, stay weight-only.
"""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear as float_linear

from ..quant_core.format import Format
from .capability import Problem, ability, kernels_read, linear_path
from .kernels.activation import quantize_activation
from .kernels.decode import decode
from .kernels.scaled_dot import scaled_dot, scaled_mm
from .kernels.weight import Weight, weight_of
from .kernels.weight_only import decode_dot, gemv
from .params import PlainParams


@lru_cache(maxsize=256)
def variant(fmt: Format, group_size: int) -> Format:
    """The format with a layer's own group size, whether or not the pack offers that size for new files."""
    return fmt if fmt.group_size is None or fmt.group_size == group_size else replace(fmt, group_size=group_size)


def stored_shape(params: PlainParams) -> tuple[int, int]:
    """[N, K] of the codes, whichever way round the tensor is shown."""
    shape = tuple(params.orig_shape)
    return shape[::-1] if params.transposed else shape


def dequantize(fmt: Format, qdata: Tensor, params: PlainParams, dtype: torch.dtype) -> Tensor:
    """[N, K] of dtype: value * scale in float32, rounded once. The same bits on every device."""
    weight = _weight(fmt, qdata, params)
    if kernels_read(_problem(weight, 0, dtype), ability(qdata.device)):
        return decode(weight, dtype)
    shape = stored_shape(params)
    return variant(fmt, params.group_size).dequantize(_tensors(qdata, params), shape).to(dtype)


def linear(fmt: Format, x: Tensor, qdata: Tensor, params: PlainParams, bias: Tensor | None) -> Tensor:
    """x [..., K] of a float dtype -> [..., N] in x's dtype. The bias is cast to it. x and the weight share a device."""
    weight = _weight(fmt, qdata, params)
    bias = None if bias is None else bias.to(x.dtype)
    rows = x.shape[:-1].numel()
    usable = x.device == qdata.device and x.shape[-1:] == (weight.shape[1],)
    chosen = linear_path(_problem(weight, rows, x.dtype), ability(qdata.device)) if usable else "dequantize"
    if chosen in ("dequantize", "decode"):      # also a mismatch, so that torch words the error
        return float_linear(x, dequantize(fmt, qdata, params, x.dtype), bias)
    flat = x.reshape(rows, weight.shape[1]).contiguous()
    return _on_kernel(chosen, flat, weight, None if bias is None else bias.contiguous()).view(*x.shape[:-1], -1)


def _on_kernel(chosen: str, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if chosen == "gemv":
        return gemv(x, weight, bias)
    if chosen == "decode_dot":
        return decode_dot(x, weight, bias)
    codes, scale = quantize_activation(x, weight.group_cols, weight.codes.dtype)
    matmul = scaled_mm if chosen == "scaled_mm" else scaled_dot
    return matmul(codes, scale, weight, bias, x.dtype)


def _problem(weight: Weight, rows: int, dtype: torch.dtype) -> Problem:
    return Problem(weight.kind, rows, weight.shape[0], weight.shape[1], weight.group_rows, weight.group_cols, dtype)


def _weight(fmt: Format, qdata: Tensor, params: PlainParams) -> Weight:
    return weight_of(variant(fmt, params.group_size), qdata, params.scale, getattr(params, "codebook", None),
                     stored_shape(params))


def _tensors(qdata: Tensor, params: PlainParams) -> dict[str, Tensor]:
    """As on disk: {suffix: tensor}."""
    fields = {f"weight_{name}": getattr(params, name) for name in params._tensor_fields()}
    return {"weight": qdata, **fields}
