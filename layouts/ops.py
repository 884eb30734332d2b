"""Dispatch of our layouts: linear, and t + mm + addmm together, which linear becomes outside inference mode.

Every other operation is comfy-kitchen's: it moves and copies a QuantizedTensor as it is, and dequantizes for the rest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, register_layout_op
from comfy_kitchen.tensor.base import dequantize_args
from torch import Tensor

from . import torch_ops
from .base import QuantPressLayout

aten = torch.ops.aten


def _is_ours(value: Any) -> bool:
    return isinstance(value, QuantizedTensor) and issubclass(value.layout_cls, QuantPressLayout)


def _run(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    return torch_ops.linear(weight.layout_cls.FORMAT.name, x, weight._qdata, weight._params, bias)


def _linear(qt: Any, args: tuple, kwargs: dict) -> Tensor:
    x, weight, bias = (*args, kwargs.get("bias"))[:3] if len(args) < 3 else args
    x, bias = dequantize_args(x), dequantize_args(bias)
    if not _is_ours(weight) or weight._params.transposed:
        weight = dequantize_args(weight) if _is_ours(weight) else weight
        return aten.linear.default(x, weight, bias)
    return _run(x, weight, bias)


def _t(qt: QuantizedTensor, args: tuple, kwargs: dict) -> QuantizedTensor:
    params = qt._params
    flipped = replace(params, transposed=not params.transposed, orig_shape=tuple(params.orig_shape)[::-1])
    # t returns a view, and torch refuses one whose base is a normal tensor and which is itself an inference tensor.
    with torch.inference_mode(False):
        return qt._copy_with(params=flipped)


def _mm(qt: Any, args: tuple, kwargs: dict) -> Tensor:
    a, b = args
    a = dequantize_args(a)
    if _is_ours(b) and b._params.transposed:
        return _run(a, b, None)
    return aten.mm.default(a, dequantize_args(b))


def _addmm(qt: Any, args: tuple, kwargs: dict) -> Tensor:
    bias, a, b = args
    bias, a = dequantize_args(bias), dequantize_args(a)
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if not (_is_ours(b) and b._params.transposed):
        return aten.addmm.default(bias, a, dequantize_args(b), beta=beta, alpha=alpha)
    if beta == 1 and alpha == 1 and bias.dim() == 1 and bias.shape[0] == b.shape[1]:
        return _run(a, b, bias)
    product = alpha * _run(a, b, None)
    # beta 0 ignores the bias, NaN included, as torch's addmm does.
    return product if beta == 0 else product + beta * bias.to(a.dtype)


def register_ops(layout: type[QuantPressLayout]) -> None:
    """t comes with mm and addmm or not at all: alone it would leave a transposed tensor that nothing multiplies."""
    for op, handler in (
        (aten.linear.default, _linear),
        (aten.t.default, _t),
        (aten.mm.default, _mm),
        (aten.addmm.default, _addmm),
    ):
        register_layout_op(op, layout)(handler)
