"""Quantized layers without a comfy_quant description: legacy fp8_scaled and INT8, ModelOpt, files that lost theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.header import TensorInfo
from ..checkpoint.source import Source
from ..errors import InputFileError, Remedy
from ..numerics.packing import swizzle_scales
from .form import Form
from .inferred import infer
from .scale_names import fitting, other_scales
from .suffixes import DESCRIPTION, QUANT_SUFFIXES

# Legacy fp8_scaled and INT8 files name the same tensors differently.
LEGACY_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
LEGACY_MARKER = "scaled_fp8"
CODED = ("F8_E4M3", "F8_E5M2", "I8", "U8")
_BARE_SUFFIXES = tuple(suffix for suffix in QUANT_SUFFIXES if suffix not in ("weight", "weight_scalar", DESCRIPTION))
INVERSE = "weight_scale_inv"  # transformers' name for 2-D block scales; they multiply on decode all the same


@dataclass(frozen=True, slots=True)
class Undescribed:
    """names: {suffix: tensor name}. config: the comfy_quant object that it would have."""

    layer: str
    form: Form
    config: dict[str, Any]
    names: dict[str, str]


def undescribed_layers(
    src: Source, described: Collection[str], scale_name: str | None = None
) -> Iterator[Undescribed]:
    """Every layer that its scales show is quantized and that nothing in the file describes.

    The weight's own dtype decides: a scale beside a 16-bit weight is a dummy. scale_name: how scales are called whose
    name is not known. Raises InputFileError, naming the layer, when the tensors do not tell the format, or what may be
    its scale is not certain to be; RequestError: no scale is called scale_name.
    """
    exported = is_modelopt(src)
    others = other_scales(src, described, scale_name)
    others.require_certain(src)
    for name, info in src.tensors.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer in described or info.dtype not in CODED:
            continue
        if f"{layer}.scale_weight" in src.tensors:
            yield _legacy(src, layer)
            continue
        names = {suffix: f"{layer}.{suffix}" for suffix in _BARE_SUFFIXES if f"{layer}.{suffix}" in src.tensors}
        if f"{layer}.{INVERSE}" in src.tensors:
            names.setdefault("weight_scale", f"{layer}.{INVERSE}")
        if layer in others.scales:
            yield _other_name(src, layer, {**names, "weight": name, "weight_scale": others.scales[layer]})
        elif set(names) & {"weight_scale", "weight_s_rel"}:
            yield _bare(src, layer, {"weight": name, **names}, exported)


def _legacy(src: Source, layer: str) -> Undescribed:
    names = {"weight": f"{layer}.weight"} | {
        suffix: f"{layer}.{old}" for old, suffix in LEGACY_NAMES.items() if f"{layer}.{old}" in src.tensors
    }
    found = infer(layer, _infos(src, names), unrotated=True)
    return Undescribed(layer, Form.LEGACY, found.config, names)


def _bare(src: Source, layer: str, names: dict[str, str], exported: bool) -> Undescribed:
    infos = _infos(src, names)
    found = infer(layer, infos)
    if not found.format.modelopt_differs:
        return Undescribed(layer, Form.BARE, found.config, names)
    if exported:
        return Undescribed(layer, Form.MODELOPT, found.config, names)
    if found.format.modelopt_order_fits(infos):
        raise InputFileError(
            f"{layer}: {found.format.name.upper()} without metadata: ComfyUI and ModelOpt order nibbles and block "
            f"scales differently, and these shapes fit both: {found.format.name} (ComfyUI's) or modelopt. ModelOpt's "
            "hf_quant_config.json beside the file tells.",
            "assume",
            Remedy.SAY_FORMAT,
        )
    return Undescribed(layer, Form.BARE, found.config, names)


def _other_name(src: Source, layer: str, names: dict[str, str]) -> Undescribed:
    """Rows that this pack or ComfyUI rotated have descriptions, so these are not rotated."""
    if f"{layer}.scale_input" in src.tensors:
        names.setdefault("input_scale", f"{layer}.scale_input")
    weight = src.tensors[names["weight"]]
    fits = fitting(weight, src.tensors[names["weight_scale"]])[0]
    found = infer(layer, {"weight": weight, "weight_scale": fits}, unrotated=True)
    return Undescribed(layer, Form.OTHER_NAME, found.config, names)


def _infos(src: Source, names: dict[str, str]) -> dict[str, TensorInfo]:
    return {suffix: src.tensors[name] for suffix, name in names.items()}


def is_modelopt(src: Source) -> bool:
    """Whether the file says that NVIDIA ModelOpt exported it: in its header, or in the JSON files beside it."""
    texts = [src.metadata.get("quantization_config", "")]
    for name in ("hf_quant_config.json", "config.json"):
        beside = src.path.parent / name
        if beside.is_file() and beside.stat().st_size < 1_000_000:
            texts.append(beside.read_text(encoding="utf-8", errors="replace"))
    return any(_names_modelopt(text) for text in texts)


def _names_modelopt(text: str) -> bool:
    try:
        content = json.loads(text)
    except ValueError:
        return False
    if not isinstance(content, dict):
        return False
    inner = content.get("quantization_config")
    method = (inner if isinstance(inner, dict) else content).get("quant_method")
    producer = content.get("producer")
    return method == "modelopt" or (isinstance(producer, dict) and producer.get("name") == "modelopt")


REORDERED = ("weight", "weight_scale")


def modelopt_to_comfy(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """ModelOpt's NVFP4 weight [N, K / 2] and block scales [N, K / 16] in ComfyUI's order. Exact: no value changes.

    ModelOpt puts the even column into the LOW nibble and leaves the scales in row order.
    Source: TensorRT-Model-Optimizer, quantization/qtensor/nvfp4_tensor.py.
    """
    rows, half = weight.shape
    padded = weight.new_zeros(((rows + 15) // 16 * 16, (half + 7) // 8 * 8))
    padded[:rows, :half] = (weight << 4) | (weight >> 4)
    blocks = torch.zeros((padded.shape[0], padded.shape[1] // 8), dtype=torch.uint8)
    blocks[:rows, : scale.shape[1]] = scale.view(torch.uint8)
    return padded, swizzle_scales(blocks).view(torch.float8_e4m3fn)


def is_marker(name: str) -> bool:
    return name == LEGACY_MARKER or name.endswith(f".{LEGACY_MARKER}")


def marker_size(src: Source) -> int | None:
    """Elements of the legacy scaled_fp8 marker; None when there is none.

    Where there are two, ComfyUI multiplies in full precision.
    """
    sizes = [math.prod(info.shape) for name, info in src.tensors.items() if is_marker(name)]
    return max(sizes) if sizes else None
