"""What a file holds that would be taken for something else than it is: codes without a description, unknown scales."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..checkpoint.header import TensorInfo
from ..checkpoint.metadata import CONFIG_SUFFIX
from ..checkpoint.source import Source
from ..errors import InputFileError, Problem, Remedy, counted, some_of
from .bnb_state import STATE_PREFIX
from .configs import layer_configs
from .families import NAMED_SCALE, family_problem
from .neighbours import Neighbours
from .scale_names import KNOWN_SCALES, is_scale, other_scales
from .suffixes import QUANT_SUFFIXES

_PACKED = ("I8", "U8", "I16", "U16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2")
# Of a weight, these are codes as well; elsewhere I64 are indices.
_OF_WEIGHTS = (*_PACKED, "I64", "U64", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


@dataclass(frozen=True, slots=True)
class Unread:
    """code: of verify's finding."""

    code: str
    problem: Problem


def unread(src: Source) -> list[Unread]:
    """For verify. Reads headers and descriptions, and scales whose names are not ours."""
    family = family_problem(src)
    if family is not None:
        return [Unread("foreign", Problem(family))]
    described = _described(src)
    codes = codes_problem(src)
    found = [] if codes is None else [Unread("undescribed", Problem(codes))]
    return found + _scale_names(src, described)


def require_known(src: Source, *, scales_named: bool = False) -> None:
    """InputFileError: the file is of another quantizer. scales_named: the user says which tensors are the scales."""
    problem = family_problem(src, scales_named=scales_named)
    if problem is not None:
        raise InputFileError(f"{src.path}: {problem}")


def codes_problem(src: Source, known: Collection[str] = ()) -> str | None:
    """Which weights are codes that nothing describes, and what to do. Sentences without the path; None for none.

    known: further layers that are described.
    """
    found = list(_undescribed_codes(src, {*_described(src), *known}))
    if not found:
        return None
    listed = some_of([f"{info.name} ({info.dtype} {list(info.shape)})" for info in found], shown=3)
    way = f" {NAMED_SCALE}" if any(info.dtype == "I8" and info.name.endswith(".weight") for info in found) else ""
    return (
        f"{counted(len(found), 'tensor holds', 'tensors hold')} codes, and nothing in the file says what they stand "
        f"for: {listed}. They are of a quantizer that this pack does not read; a format is known by a comfy_quant "
        "description, or by scales called weight_scale. Read the file with the program that wrote it, or take the "
        f"16-bit model.{way}"
    )


def _described(src: Source) -> set[str]:
    """The layers that something in the file describes, or that have scales of a known name."""
    layers = {name.removesuffix(CONFIG_SUFFIX) for name in src.tensors if name.endswith(CONFIG_SUFFIX)}
    for name in src.tensors:
        owner, found, _ = name.partition("." + STATE_PREFIX)
        layer, _, last = name.rpartition(".")
        if found:
            layers.add(owner.removesuffix(".weight"))
        elif last in KNOWN_SCALES:
            layers.add(layer)
    try:
        return layers | layer_configs(src, lenient=True).layers.keys()
    except InputFileError:  # a damaged description: whoever reads it says so
        return layers


def _undescribed_codes(src: Source, described: Collection[str]) -> Iterator[TensorInfo]:
    beside = Neighbours(src)
    for name, info in src.tensors.items():
        layer, _, last = name.rpartition(".")
        if layer in described or info.dtype not in _OF_WEIGHTS or math.prod(info.shape) < 2:
            continue
        scaled = any(is_scale(one.end) for one in beside.of(name))
        if last == "weight":
            if len(info.shape) > 1 or scaled:
                yield info
        elif info.dtype in _PACKED and _is_matrix(info) and last not in QUANT_SUFFIXES:
            yield from [info] if scaled or any(map(is_scale, beside.siblings(name))) else []


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) > 1 and min(info.shape) > 1


def _scale_names(src: Source, described: Collection[str]) -> list[Unread]:
    others, found = other_scales(src, described), []
    if others.scales:
        names = list(others.scales.values())
        text = (
            f"{counted(len(names), 'FP8 weight has its scale', 'FP8 weights have their scales')} under another name "
            f"than weight_scale: {some_of(names, shown=3)}. ComfyUI would take the codes for the weights. "
            "`quantpress migrate`, or the node Migrate Legacy File, renames them."
        )
        found.append(Unread("scale-name", Problem(text)))
    if others.doubts:
        found.append(Unread("scale-name", Problem(others.problem, "scale_name", Remedy.SAY_SCALE)))
    return found
