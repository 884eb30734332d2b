"""One file per format. This is the list of them, in the order of every table."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError, did_you_mean
from . import (
    asym_w4a8_int8,
    awq_w4a16,
    bnb_af4,
    bnb_fp4,
    bnb_nf4,
    convrot_w4a4,
    float8_e4m3fn,
    float8_e4m3fn_block3d,
    float8_e4m3fn_blockwise,
    float8_e4m3fn_rowwise,
    float8_e5m2,
    int8_blockwise,
    int8_convrot,
    int8_lodewise,
    int8_rowwise,
    int8_tensorwise,
    mxfp8,
    nvfp4,
)
from .base import Format

ALL: tuple[Format, ...] = (
    float8_e4m3fn.FORMAT,
    float8_e5m2.FORMAT,
    float8_e4m3fn_rowwise.FORMAT,
    float8_e4m3fn_blockwise.FORMAT,
    float8_e4m3fn_block3d.FORMAT,
    int8_tensorwise.FORMAT,
    int8_rowwise.FORMAT,
    int8_convrot.FORMAT,
    int8_blockwise.FORMAT,
    int8_lodewise.FORMAT,
    mxfp8.FORMAT,
    nvfp4.FORMAT,
    convrot_w4a4.FORMAT,
    asym_w4a8_int8.FORMAT,
    awq_w4a16.FORMAT,
    bnb_nf4.FORMAT,
    bnb_fp4.FORMAT,
    bnb_af4.FORMAT,
)


def all_formats() -> tuple[Format, ...]:
    """Every format, in the order of the documentation table."""
    return ALL


def weight_suffixes() -> tuple[str, ...]:
    """The suffixes of every format's tensors, each once."""
    return tuple(dict.fromkeys(suffix for fmt in ALL for suffix in fmt.suffixes))


def get_format(name: str, group_size: int | None = None, rotation: int | None = None) -> Format:
    """RequestError that lists the names when there is none such."""
    known = {fmt.name: fmt for fmt in all_formats()}
    if name not in known:
        raise RequestError(
            f"there is no format {name!r}.{did_you_mean(name, known)} Known formats: {', '.join(known)}."
        )
    return known[name].with_options(group_size, rotation)


def format_of_layer(layer: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Format:
    """The format of a stored layer. config: its comfy_quant object; shapes: {suffix: shape} of its tensors."""
    on_disk = config.get("format")
    candidates = [fmt for fmt in all_formats() if fmt.on_disk == on_disk]
    if not candidates:
        names = ", ".join(dict.fromkeys(fmt.on_disk for fmt in all_formats()))
        raise RequestError(f"{layer}: the format {on_disk!r} is unknown. This pack reads: {names}.")
    _require_sizes(layer, config)
    for fmt in candidates:
        variant = fmt.accepts(config, shapes)
        if variant is not None:
            return variant
    missing = min(
        ([suffix for suffix in fmt.suffixes if suffix not in shapes] for fmt in candidates),
        key=len,
    )
    found = ", ".join(f"{suffix} {list(shape)}" for suffix, shape in shapes.items())
    if missing:
        raise RequestError(
            f"{layer}: stored as {on_disk}, but {' and '.join(missing)} is missing; found {found}. "
            "Take the file from its source again, or quantize the original anew."
        )
    raise RequestError(
        f"{layer}: stored as {on_disk}, but its tensors do not fit each other or its description: {found}; {config}. "
        "Quantize the original anew, or give the right values with Edit Metadata."
    )


def _require_sizes(layer: str, config: dict[str, Any]) -> None:
    """Raises RequestError when a size in the layer's JSON is none."""
    for key, count in (("orig_shape", 2), ("shape", 2), ("group_size", 1), ("convrot_groupsize", 1)):
        recorded = config.get(key)
        if not recorded:
            continue
        sizes = recorded if count > 1 and isinstance(recorded, list | tuple) else [recorded]
        if len(sizes) != count or not all(type(size) is int and size > 0 for size in sizes):
            needed = "a list of two positive integers" if count > 1 else "a positive integer"
            raise RequestError(
                f"{layer}: {key} in its comfy_quant object is {recorded!r}; needed is {needed}. "
                "Give the right value with Edit Metadata, or take the file from its source again."
            )
