"""Scales beside FP8 weights under names that are not ours: which of them are certain, and what is wrong with the rest.

A scale here multiplies the codes, as in every form that this pack reads. Other programs divide by theirs, and the name
does not tell; the values do. Codes are spread to the ends of their range, so a scale that multiplies is far below 1,
and one that divides is far above it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from ..checkpoint.header import TensorInfo
from ..checkpoint.source import Source
from ..errors import InputFileError, Remedy, RequestError, some_of
from .inferred import candidates
from .neighbours import Neighbour, Neighbours

FP8 = ("F8_E4M3", "F8_E5M2")
# Beside a weight, scales of these names are known.
KNOWN_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "weight_s_rel")
_FLOATS = ("F64", "F32", "F16", "BF16")
_EXPONENTS = ("U8", "F8_E8M0")
# What the name of a weight's scale may be made of, for it to be clear.
_SCALES = {"scale", "scales", "scaling", "qscale", "qscales", "wscale", "wscales"}
_WORDS = _SCALES | {"weight", "weights", "w", "q", "quant", "dequant", "dq", "fp8", "factor", "factors", "inv", ""}
_WORDS |= {"inverse", "tensor", "row", "channel", "block", "per", "wise"}
_OF_INPUTS = {"input", "inputs", "in", "act", "activation", "activations", "x", "output", "outputs", "out"}
_OWN = {"bias", "alpha", "dora", "lora", "lokr", "loha", "hada"}
_LARGEST = 1.0  # of the median of a scale that multiplies


@dataclass(frozen=True, slots=True)
class OtherScales:
    """scales: {layer: tensor name}, those that are certain. doubts: a sentence's begin for every other weight."""

    scales: Mapping[str, str]
    doubts: tuple[str, ...]

    @property
    def problem(self) -> str:
        """All doubts. Sentences without the path."""
        more = f" (and {len(self.doubts) - 1} more like it)" if len(self.doubts) > 1 else ""
        return (
            f"{self.doubts[0]}{more}. Without their scales the codes would be taken for the weights. Needed is "
            "weight_scale, which multiplies the codes: one number, one for each row, or one for each block."
        )

    def require_certain(self, src: Source) -> None:
        """InputFileError when there are doubts."""
        if self.doubts:
            raise InputFileError(f"{src.path}: {self.problem}", "scale_name", Remedy.SAY_SCALE)


def other_scales(src: Source, described: Collection[str], named: str | None = None) -> OtherScales:
    """What stands beside the FP8 weights that nothing describes, and may be their scales.

    described: layers that need none of this. named: the end of the scales' names, as the user says it; they multiply,
    beside INT8 weights too. Reads the scales. Raises RequestError: no scale has that name.
    """
    beside, scales, doubts, anyone_said = Neighbours(src), {}, [], False
    for name, info in src.tensors.items():
        layer = name.removesuffix(".weight")
        if info.dtype not in (*FP8, "I8") or layer in described or is_scale(name.rpartition(".")[2]):
            continue
        if any(f"{layer}.{known}" in src.tensors for known in KNOWN_SCALES):
            continue
        around = list(beside.of(name))
        said = [one for one in around if named is not None and one.is_called(named)]
        suspects = said or [one for one in around if info.dtype in FP8 and _is_suspect(src, info, one)]
        anyone_said = anyone_said or bool(said)
        if not suspects:
            continue
        why = _doubt(src, info, suspects, certain=bool(said))
        if why is None:
            scales[layer] = suspects[0].name
        else:
            listed = some_of([_described(src.tensors[one.name]) for one in suspects], shown=3)
            doubts.append(f"{_described(info)} stands beside {listed}{why}")
    if named is not None and not anyone_said:
        raise RequestError(
            f"{named!r} is the end of no tensor's name beside an FP8 or INT8 weight of {src.path}. Look at the names "
            "with `quantpress inspect`, or the node Inspect Quantization.",
            "scale_name",
        )
    return OtherScales(scales, tuple(doubts))


def is_scale(end: str) -> bool:
    """Whether a name that ends so speaks of the scale of anything but inputs."""
    words = _words(end)
    return any("scale" in word or word in _SCALES for word in words) and not words & (_OF_INPUTS | _OWN)


def _words(end: str) -> set[str]:
    return set(re.split(r"[._]", end.lower()))


def _is_suspect(src: Source, weight: TensorInfo, one: Neighbour) -> bool:
    """Whether it may be the weight's scale: by its name; or by its shape, and nothing else is known of it."""
    info = src.tensors[one.name]
    if is_scale(one.end):
        return info.dtype in (*_FLOATS, *_EXPONENTS)
    if not one.inside or info.dtype not in _FLOATS or len(weight.shape) < 2 or _words(one.end) & (_OF_INPUTS | _OWN):
        return False
    squeezed = _squeezed(info.shape)
    return squeezed in ((), *((size,) for size in weight.shape)) or bool(fitting(weight, info))


def _doubt(src: Source, weight: TensorInfo, suspects: list[Neighbour], certain: bool) -> str | None:
    """Why the first is not surely the weight's scale, as the end of a sentence. certain: the user says it is."""
    if len(suspects) > 1:
        return ", and only one of them can be its scale"
    (one,) = suspects
    info = src.tensors[one.name]
    if len(weight.shape) != 2 or not weight.name.endswith(".weight"):
        return ", and scales are read only beside a `.weight` with two dimensions"
    if not certain and not (one.inside and _words(one.end) <= _WORDS):
        return ", whose name does not say what it is for"
    if not fitting(weight, info):
        return ", whose dtype and shape are not those of its scale"
    if info.dtype in _EXPONENTS:
        return ", and nothing tells the order of such scales (by rows, or swizzled)"
    return None if certain else _by_values(src, info)


def _by_values(src: Source, info: TensorInfo) -> str | None:
    values = src.read(info.name).to(torch.float32).reshape(-1)
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        return ", which has values that are negative, NaN or Inf"
    middle = float(values.median())
    return None if middle <= _LARGEST else f", whose values (in the middle {middle:.4g}) are those of one that divides"


def fitting(weight: TensorInfo, scale: TensorInfo) -> list[TensorInfo]:
    """The scale's header entry as some format writes it for this weight, dimensions of size 1 aside; [] for none."""
    shapes = dict.fromkeys((scale.shape, _squeezed(scale.shape)))
    tried = (replace(scale, shape=shape) for shape in shapes)
    return [one for one in tried if len(weight.shape) == 2 and candidates({"weight": weight, "weight_scale": one})]


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _described(info: TensorInfo) -> str:
    return f"{info.name} ({info.dtype} {list(info.shape)})"
