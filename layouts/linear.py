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

from ..quant_core.formats import get_format
from ..quant_core.formats.base import Format
from .capability import ability, kernels_read, linear_path
from .kernels.activation import quantize_activation
from .kernels.decode import decode
from .kernels.scaled_dot import scaled_dot, scaled_mm
from .kernels.weight import Geometry, Weight, geometry_of
from .kernels.weight_only import decode_dot, gemv
from .params import PlainParams


@lru_cache(maxsize=256)
def variant(name: str, group_size: int) -> Format:
    """The format with a layer's own group size (0: its default), whether or not the pack offers it for new files."""
    fmt = get_format(name)
    return replace(fmt, group_size=group_size) if group_size and fmt.group_size else fmt


@lru_cache(maxsize=4096)
def _geometry(name: str, group_size: int, shape: tuple[int, int]) -> Geometry | None:
    return geometry_of(variant(name, group_size), shape)


def stored_shape(params: PlainParams) -> tuple[int, int]:
    """[N, K] of the codes, whichever way round the tensor is shown."""
    shape = tuple(params.orig_shape)
    return shape[::-1] if params.transposed else shape


def weight_of(name: str, qdata: Tensor, params: PlainParams) -> Weight | None:
    """A QuantizedTensor's parts as the kernels take them; None when none reads the format. name: the format's."""
    geometry = _geometry(name, params.group_size, stored_shape(params))
    if geometry is None:
        return None
    return Weight(geometry, qdata.contiguous(), params.scale, getattr(params, "codebook", None))


def dequantize(name: str, qdata: Tensor, params: PlainParams, dtype: torch.dtype) -> Tensor:
    """[N, K] of dtype: value * scale in float32, rounded once. The same bits on every device."""
    weight = weight_of(name, qdata, params)
    if weight is not None and kernels_read(weight.geometry, ability(qdata.device)):
        return decode(weight, dtype)
    fields = {f"weight_{field}": getattr(params, field) for field in params._tensor_fields()}
    return variant(name, params.group_size).dequantize({"weight": qdata, **fields}, stored_shape(params)).to(dtype)


def linear(name: str, x: Tensor, qdata: Tensor, params: PlainParams, bias: Tensor | None) -> Tensor:
    """x [..., K] of a float dtype -> [..., N] in x's dtype.

    The bias is cast to that dtype. x and the weight share a device.
    """
    weight = weight_of(name, qdata, params)
    n, k = stored_shape(params)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    rows = x.shape[:-1].numel()
    chosen = "dequantize"  # also a mismatch, so that torch words the error
    if weight is not None and x.device == qdata.device and x.dim() > 0 and x.shape[-1] == k:
        chosen = linear_path(weight.geometry, rows, x.dtype, ability(qdata.device))
    if weight is None or chosen in ("dequantize", "decode"):
        return float_linear(x, dequantize(name, qdata, params, x.dtype), bias)
    return on_kernel(chosen, x.reshape(rows, k).contiguous(), weight, bias).view(*x.shape[:-1], n)


def on_kernel(chosen: str, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x [M, K] contiguous -> [M, N]. chosen: one of linear_path's kernels."""
    if chosen == "gemv":
        return gemv(x, weight, bias)
    if chosen == "decode_dot":
        return decode_dot(x, weight, bias)
    codes, scale = quantize_activation(x, weight.geometry.group_cols, weight.codes.dtype)
    matmul = scaled_mm if chosen == "scaled_mm" else scaled_dot
    return matmul(codes, scale, weight, bias, x.dtype)
