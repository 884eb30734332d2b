"""Legacy fp8_scaled files that stay legacy: tidied, or given the scale_input that some loaders want."""

from __future__ import annotations

import math

import torch

from ..checkpoint.source import Source
from ..errors import InputFileError, RequestError
from ..names.prefixes import known_prefix
from ..stored.foreign import refusal
from ..stored.legacy import LEGACY_MARKER, LEGACY_NAMES, is_marker
from .rewrite import Draft, Rewrite

_FP8 = ("F8_E4M3", "F8_E5M2")


def cleanup_legacy(src: Source, *, marker: int = 0, scale_input: bool = False, normalise: bool = True) -> Rewrite:
    """Scales beside weights that are not FP8 are dropped, the marker gets this many elements (0 or 2; 2 makes ComfyUI
    multiply in full precision), and scales of one element lose their dimensions.

    scale_input: 1.0 is added where an FP8 layer has none. normalise: False leaves the scales' shapes.
    Raises RequestError: no legacy scales in the file, another marker size. InputFileError: another quantizer's file.
    """
    if marker not in (0, 2):
        raise RequestError(f"a marker of {marker} elements is not offered. Choose 0, or 2 for full precision.")
    draft = _legacy_draft(src)
    for name in draft:
        layer, _, last = name.rpartition(".")
        weight = src.tensors.get(f"{layer}.weight")
        if last in LEGACY_NAMES and (weight is None or weight.dtype not in _FP8):
            draft.drop(name)
    if scale_input:
        _add_scale_input(draft)
    _set_marker(draft, marker)
    if normalise:
        for name in draft:
            info = src.tensors.get(name)
            if (
                info is not None
                and name.rpartition(".")[2] in LEGACY_NAMES
                and info.shape
                and math.prod(info.shape) == 1
            ):
                draft.retype(name, shape=())
    return draft.finish()


def add_legacy_input(src: Source) -> Rewrite:
    """scale_input 1.0 for every FP8 layer without one, and a marker of one element.

    Raises RequestError: not legacy. InputFileError: another quantizer's file.
    """
    draft = _legacy_draft(src)
    _add_scale_input(draft)
    _set_marker(draft, 1)
    return draft.finish()


def _legacy_draft(src: Source) -> Draft:
    foreign = refusal(src)
    if foreign is not None:
        raise InputFileError(foreign)
    if not any(name.endswith(".scale_weight") for name in src.tensors):
        raise RequestError(
            f"{src.path}: no tensor is called scale_weight, so this is not a legacy fp8_scaled file. For others see "
            "`quantpress repair`."
        )
    return Draft(src)


def _add_scale_input(draft: Draft) -> None:
    for name in draft:
        layer = name.removesuffix(".scale_weight")
        weight = draft.src.tensors.get(f"{layer}.weight")
        if layer != name and weight is not None and weight.dtype in _FP8 and f"{layer}.scale_input" not in draft:
            draft.put(f"{layer}.scale_input", torch.ones(()), after=name)


def _set_marker(draft: Draft, size: int) -> None:
    """Markers that have the size already stay; without any, one is added beside the layers."""
    src = draft.src
    markers = [name for name in draft if is_marker(name)]
    if not markers:
        first = next(name for name in draft if name.endswith(".scale_weight"))
        markers = [known_prefix(first) + LEGACY_MARKER]
    for name in markers:
        if name not in draft or math.prod(src.tensors[name].shape) != size or len(src.tensors[name].shape) != 1:
            of = (name,) if name in draft else ()
            draft.put(name, torch.zeros(size).to(torch.float8_e4m3fn), of=of)
