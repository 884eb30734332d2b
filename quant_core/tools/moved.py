"""Descriptions and scales that stand under another checkpoint prefix than the weights they belong to."""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoint.source import Source
from ..names.prefixes import prefix_changes
from ..stored.legacy import CODED
from ..stored.suffixes import QUANT_SUFFIXES

_BESIDE = tuple(suffix for suffix in QUANT_SUFFIXES if suffix != "weight")


def moved_layers(src: Source) -> dict[str, str]:
    """{layer as its scales and description call it: as its weight is called}, where one change of prefix mends all.

    Only for weights that are codes and have no scales or description of their own.
    """
    strays = _strays(src)
    for change in prefix_changes() if strays else ():
        moved = {layer: change(layer) for layer in strays}
        if all(_lacks_its_own(src, layer) for layer in moved.values()) and len(set(moved.values())) == len(moved):
            return moved
    return {}


def _strays(src: Source) -> Iterable[str]:
    owners = [name.rpartition(".")[0] for name in src.tensors if name.rpartition(".")[2] in _BESIDE]
    return dict.fromkeys(layer for layer in owners if layer and f"{layer}.weight" not in src.tensors)


def _lacks_its_own(src: Source, layer: str) -> bool:
    weight = src.tensors.get(f"{layer}.weight")
    return weight is not None and weight.dtype in CODED and not any(f"{layer}.{s}" in src.tensors for s in _BESIDE)
