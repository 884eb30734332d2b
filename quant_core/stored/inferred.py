"""The format of a layer whose metadata is missing or wrong, from the dtypes and shapes of its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.header import TensorInfo
from ..errors import InputFileError
from ..numerics.packing import swizzled_shape

_FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_FLOATS = ("F32", "F16", "BF16", "F64")
BYTES = ("U8", "F8_E4M3", "F8_E8M0")


def infer_config(layer: str, infos: Mapping[str, TensorInfo], *, unrotated: bool = False) -> dict[str, Any]:
    """The comfy_quant object that fits a layer's tensors. infos: {suffix: header entry}, `weight` among them.

    unrotated: the caller knows that the rows were not rotated (legacy INT8 files never were). Raises InputFileError,
    naming the layer: no format has these shapes, or more than one does.
    """
    weight, scale = infos["weight"], infos.get("weight_scale")
    if scale is None or len(weight.shape) != 2:
        raise _unknown(layer, infos)
    if "weight_scale_2" in infos and weight.dtype == "U8" and scale.dtype in BYTES:
        return {"format": "nvfp4"}
    if "weight_zeros" in infos and weight.dtype == "I8" and len(scale.shape) == 2 and scale.shape[0]:
        return {"format": "awq_w4a16", "group_size": weight.shape[1] * 2 // scale.shape[0]}
    if weight.dtype == "F8_E4M3" and scale.dtype in ("U8", "F8_E8M0"):
        rows, cols = weight.shape
        if cols % 32 == 0 and scale.shape in (swizzled_shape(rows, cols // 32), (rows, cols // 32)):
            return {"format": "mxfp8"}
        raise _unknown(layer, infos)
    if scale.dtype not in _FLOATS:
        raise _unknown(layer, infos)
    if weight.dtype in _FP8:
        config = _fp8(_FP8[weight.dtype], weight.shape, scale.shape)
    elif weight.dtype == "I8":
        config = _int8(layer, weight.shape, scale.shape, unrotated)
    else:
        config = None
    if config is None:
        raise _unknown(layer, infos)
    return config


def _fp8(base: str, weight: tuple[int, ...], scale: tuple[int, ...]) -> dict[str, Any] | None:
    rows, cols = weight
    if all(size == 1 for size in scale):
        return {"format": base}
    if base != "float8_e4m3fn":
        return None
    if scale in ((rows,), (rows, 1)):
        return {"format": "float8_e4m3fn_rowwise"}
    if len(scale) in (2, 3) and scale[1] and cols % scale[1] == 0 and scale[2:] in ((), (1,)):
        group = cols // scale[1]
        if scale[0] == rows:
            return {"format": "float8_e4m3fn_block3d", "group_size": group}
        if len(scale) == 2 and scale[0] * group == rows:
            return {"format": "float8_e4m3fn_blockwise", "group_size": group}
    return None


def _int8(layer: str, weight: tuple[int, ...], scale: tuple[int, ...], unrotated: bool) -> dict[str, Any] | None:
    rows, cols = weight
    if all(size == 1 for size in scale):
        return {"format": "int8_tensorwise"}
    if scale in ((rows,), (rows, 1)):
        if not unrotated:
            raise InputFileError(
                f"{layer}: int8 with one scale per row and no metadata: the rows may be rotated (ConvRot) or "
                "not, and the file does not say. Name the format: `quantpress repair --assume int8_rowwise` or "
                "`--assume int8_convrot`, or find out with `--against SOURCE`."
            )
        return {"format": "int8_tensorwise", "per_row": True}
    if len(scale) == 2 and scale[1] and cols % scale[1] == 0:
        group = cols // scale[1]
        if scale[0] == rows:
            return {"format": "int8_lodewise", "group_size": group}
        if scale[0] * group == rows:
            return {"format": "int8_blockwise", "group_size": group}
    return None


def _unknown(layer: str, infos: Mapping[str, TensorInfo]) -> InputFileError:
    found = ", ".join(f"{suffix} {info.dtype} {list(info.shape)}" for suffix, info in infos.items())
    return InputFileError(
        f"{layer}: no known format has these tensors without metadata: {found}. Take the model from its "
        "source, or another file of it."
    )
