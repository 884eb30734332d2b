"""Our two computations as operations that torch knows: torch.compile puts them into its graph as they are.

A compiler runs a model on tensors without data. It cannot launch a kernel on them or look a code up in a table. Of an
operation it needs the shape and the dtype of the result, and nothing else. Inside the operation the number of rows
decides which kernel runs, so a graph with a symbolic batch serves every batch. An operation takes tensors and plain
values, so the format goes by its name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import linear as maths
from .params import CodebookParams, PlainParams

_WEIGHT = "Tensor codes, Tensor scale, Tensor? codebook, str format, int group_size, int n, int k"
# FRAGMENT: a second copy of the pack in one process, under another name, finds the operations there, and uses them.
_LIBRARY = torch.library.Library("quantpress", "FRAGMENT")


def dequantize(name: str, qdata: Tensor, params: PlainParams, dtype: torch.dtype) -> Tensor:
    """[N, K] of dtype, as linear.dequantize says."""
    if _has_data(qdata):
        return maths.dequantize(name, qdata, params, dtype)
    return torch.ops.quantpress.dequantize(*_weight(name, qdata, params), dtype)


def linear(name: str, x: Tensor, qdata: Tensor, params: PlainParams, bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., N], as linear.linear says."""
    if _has_data(x) and _has_data(qdata):
        return maths.linear(name, x, qdata, params, bias)
    return torch.ops.quantpress.linear(x, bias, *_weight(name, qdata, params))


def _has_data(tensor: Tensor) -> bool:
    """False for the subclasses that compilers trace with. Called directly, a layer is spared 20 us of dispatch."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _weight(name: str, qdata: Tensor, params: PlainParams) -> tuple[Any, ...]:
    n, k = maths.stored_shape(params)
    return qdata, params.scale, getattr(params, "codebook", None), name, params.group_size, n, k


def _params(scale: Tensor, codebook: Tensor | None, group_size: int, n: int, k: int) -> PlainParams:
    fields: dict[str, Any] = {
        "scale": scale,
        "orig_dtype": torch.float32,
        "orig_shape": (n, k),
        "group_size": group_size,
    }
    return PlainParams(**fields) if codebook is None else CodebookParams(**fields, codebook=codebook)


def _dequantize(
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor | None,
    format: str,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    return maths.dequantize(format, codes, _params(scale, codebook, group_size, n, k), dtype)


def _linear(
    x: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor | None,
    format: str,
    group_size: int,
    n: int,
    k: int,
) -> Tensor:
    return maths.linear(format, x, codes, _params(scale, codebook, group_size, n, k), bias)


def _dequantize_shape(codes: Tensor, *weight: Any) -> Tensor:
    *_, n, k, dtype = weight
    return codes.new_empty((n, k), dtype=dtype)


def _linear_shape(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    *_, n, k = weight
    torch._check(x.shape[-1] == k, lambda: f"the input has {x.shape[-1]} columns; the weight takes {k}")
    return x.new_empty((*x.shape[:-1], n))


def _define(name: str, schema: str, compute: Any, shape_of_result: Any) -> None:
    if hasattr(torch.ops.quantpress, name):
        return
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantpress::{name}", shape_of_result, lib=_LIBRARY)


_define("dequantize", f"({_WEIGHT}, ScalarType dtype) -> Tensor", _dequantize, _dequantize_shape)
_define("linear", f"(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor", _linear, _linear_shape)
