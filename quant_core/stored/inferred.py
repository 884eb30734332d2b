"""The format of a layer whose metadata is missing or wrong, from the dtypes and shapes of its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.header import TensorInfo
from ..errors import InputFileError, Remedy
from ..formats import all_formats
from ..formats.base import Format
from .suffixes import BESIDE_THE_WEIGHT


@dataclass(frozen=True, slots=True)
class Inferred:
    """config: the comfy_quant object that the layer would have."""

    format: Format
    config: dict[str, Any]


def infer(layer: str, infos: Mapping[str, TensorInfo], *, unrotated: bool = False) -> Inferred:
    """The format that recognises a layer's tensors. infos: {suffix: header entry}, `weight` among them.

    unrotated: the caller knows that the rows were not rotated (legacy INT8 files never were). Raises InputFileError,
    naming the layer: no format has these shapes, or more than one does.
    """
    found = candidates(infos) if len(infos["weight"].shape) == 2 else []
    if unrotated:
        found = [one for one in found if one.format.rotation is None]
    if not found:
        raise _unknown(layer, infos)
    if len(found) > 1:
        fmt = found[0].format
        raise InputFileError(
            f"{layer}: {fmt.element.name} with one scale per {fmt.granularity.value} and no metadata: the rows may be "
            "rotated (ConvRot) or not, and the file does not say: "
            f"{' or '.join(one.format.name for one in found)}.",
            "assume",
            Remedy.SAY_FORMAT,
        )
    return found[0]


def candidates(infos: Mapping[str, TensorInfo]) -> list[Inferred]:
    """The formats that recognise a layer's tensors; of those only the ones that account for the most of them.

    infos: {suffix: header entry}, `weight` with two dimensions among them.
    """
    found = [Inferred(fmt, config) for fmt in all_formats() if (config := fmt.recognise(infos)) is not None]
    tensors = set(infos) - set(BESIDE_THE_WEIGHT)
    known = [len(tensors & set(one.format.suffixes)) for one in found]
    return [one for one, count in zip(found, known, strict=True) if count == max(known)]


def _unknown(layer: str, infos: Mapping[str, TensorInfo]) -> InputFileError:
    listed = ", ".join(f"{suffix} {info.dtype} {list(info.shape)}" for suffix, info in infos.items())
    return InputFileError(
        f"{layer}: no known format has these tensors without metadata: {listed}. Take the model from its "
        "source, or another file of it."
    )
