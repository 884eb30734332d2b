"""Which layout runs which format: our classes, made once from the list of formats, else comfy-kitchen's."""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class, register_layout_class
from comfy_kitchen.tensor.base import LAYOUTS
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
    name = fmt.runtime.layout
    if fmt.runtime.kitchen_layout is not None and "comfy.quant_ops" not in sys.modules:
        name = fmt.runtime.kitchen_layout
    if name not in LAYOUTS:
        raise RequestError(f"{fmt.name}: the installed comfy-kitchen has no layout {name!r}. Update ComfyUI.")
    params = get_layout_class(name).Params(orig_dtype=dtype, orig_shape=tuple(shape), **fmt.runtime_params(tensors))
    return QuantizedTensor(tensors["weight"].contiguous(), name, params)
