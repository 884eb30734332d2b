"""Which layout runs which format: our classes, made once from the list of formats, else comfy-kitchen's."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class, register_layout_class
from torch import Tensor

from ..quant_core.errors import RequestError
from ..quant_core.formats import all_formats
from ..quant_core.formats.base import Format
from .base import QuantPressLayout
from .ops import register_ops
from .params import CodebookParams, PlainParams


@lru_cache(maxsize=1)
def layout_classes() -> dict[str, type[QuantPressLayout]]:
    """{layout name: class} of our formats. Made once: dispatch tells classes apart by identity."""
    return {fmt.runtime.layout: _layout_class(fmt) for fmt in all_formats() if fmt.runtime.native_since is None}


def _layout_class(fmt: Format) -> type[QuantPressLayout]:
    return type(
        fmt.runtime.layout,
        (QuantPressLayout,),
        {
            "__doc__": f"{fmt.title}, as the format {fmt.name} stores it.",
            "__module__": __name__,
            "FORMAT": fmt,
            "Params": CodebookParams if "weight_codebook" in fmt.suffixes else PlainParams,
            "MIN_SM_VERSION": fmt.runtime.min_capability,
        },
    )


def register_layouts() -> dict[str, type[QuantPressLayout]]:
    """Register our layouts and their operations in comfy-kitchen. May be called any number of times."""
    for name, layout in layout_classes().items():
        register_layout_class(name, layout)
        register_ops(layout)
    return layout_classes()


def tensor_of_layer(
    fmt: Format, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> QuantizedTensor:
    """A stored layer as the QuantizedTensor that runs it. tensors: {suffix: tensor} as on disk; nothing is copied.

    shape: the weight's logical [N, K]. dtype: what it dequantizes to, bfloat16, float16 or float32.
    Native formats get comfy-kitchen's layouts, in comfy's own variant where comfy.quant_ops is loaded.
    """
    ours = layout_classes().get(fmt.runtime.layout)
    if ours is not None:
        register_layouts()
        params = ours.params_of(tensors, shape, dtype, fmt.group_size)
        return QuantizedTensor(tensors["weight"].contiguous(), fmt.runtime.layout, params)
    name = (
        fmt.runtime.layout
        if "comfy.quant_ops" in sys.modules
        else _KITCHEN_NAMES.get(fmt.runtime.layout, fmt.runtime.layout)
    )
    if name not in _NATIVE_PARAMS:
        raise RequestError(f"{fmt.name}: no layout {name!r} is known here. Update the pack.")
    params = get_layout_class(name).Params(
        orig_dtype=dtype, orig_shape=tuple(shape), **_NATIVE_PARAMS[name](fmt, tensors)
    )
    return QuantizedTensor(tensors["weight"].contiguous(), name, params)


def _scale_only(fmt: Format, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"scale": tensors["weight_scale"]}


def _nvfp4(fmt: Format, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"scale": tensors["weight_scale_2"], "block_scale": tensors["weight_scale"].view(torch.float8_e4m3fn)}


def _mxfp8(fmt: Format, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"scale": tensors["weight_scale"].view(torch.float8_e8m0fnu)}


def _int8(fmt: Format, tensors: dict[str, Tensor]) -> dict[str, Any]:
    rotated = {"convrot": True, "convrot_groupsize": fmt.rotation} if fmt.rotation else {}
    return {"scale": tensors["weight_scale"], **rotated}


def _w4a4(fmt: Format, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"scale": tensors["weight_scale"], "convrot_groupsize": fmt.rotation}


def _w4a8(fmt: Format, tensors: dict[str, Tensor]) -> dict[str, Any]:
    codebook = {"codebook": tensors["weight_codebook"]} if "weight_codebook" in tensors else {}
    return {
        "scale": tensors["weight_s_rel"],
        "s_channel": tensors["weight_s_channel"],
        "group_size": fmt.group_size,
        "convrot_groupsize": fmt.rotation,
        **codebook,
    }


def _awq(fmt: Format, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"scale": tensors["weight_scale"], "zeros": tensors["weight_zeros"], "group_size": fmt.group_size}


# comfy registers one fp8 layout per dtype; comfy-kitchen alone has one for both.
_KITCHEN_NAMES = {"TensorCoreFP8E4M3Layout": "TensorCoreFP8Layout", "TensorCoreFP8E5M2Layout": "TensorCoreFP8Layout"}
_NATIVE_PARAMS = {
    "TensorCoreFP8Layout": _scale_only,
    "TensorCoreFP8E4M3Layout": _scale_only,
    "TensorCoreFP8E5M2Layout": _scale_only,
    "TensorCoreNVFP4Layout": _nvfp4,
    "TensorCoreMXFP8Layout": _mxfp8,
    "TensorWiseINT8Layout": _int8,
    "TensorCoreConvRotW4A4Layout": _w4a4,
    "AsymW4A8Int8Layout": _w4a8,
    "TensorCoreAWQW4A16Layout": _awq,
}
