"""Which layout a file has that does not tell itself: decode a layer each way, and compare it with its source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.source import Source
from ..errors import RequestError
from ..formats import all_formats
from ..formats.base import Format
from ..numerics.metrics import relative_error
from ..numerics.packing import swizzle_scales
from ..stored.layers import StoredLayer, stored_layers
from .diagnose import MODELOPT, diagnose

# The right layout decodes 4-bit weights within about 0.1; a wrong one gives 0.5 and more.
_RIGHT = 0.3


@dataclass(frozen=True, slots=True)
class Layout:
    """The arguments of `repair` that make it decode to the source. error: of the layer looked at, relative."""

    assume: str | None
    unswizzled: bool
    layer: str
    error: float


def _candidates() -> Iterator[tuple[str | None, bool]]:
    """(what is assumed, whether block scales are taken as not swizzled): the file's own word, then what it may omit.

    Tensors alone do not tell ComfyUI's order from ModelOpt's, nor a rotated format from its plain twin.
    """
    yield from ((None, False), (None, True))
    for fmt in all_formats():
        if fmt.modelopt_differs:
            yield from ((fmt.name, False), (fmt.name, True), (MODELOPT, False))
    for fmt in all_formats():
        if any(_is_twin(fmt, other) for other in all_formats()):
            yield fmt.name, False


def _is_twin(one: Format, other: Format) -> bool:
    """They look alike on disk, and one of them is rotated."""
    alike = one.on_disk == other.on_disk and one.granularity is other.granularity
    return alike and (one.rotation is None) != (other.rotation is None)


def find_layout(src: Source, reference: Source) -> Layout:
    """The layout under which the file's first coded layer is nearest to the reference.

    reference: the model it was made from, in 16 bits or in any form that this pack reads. Raises RequestError: the two
    share no layer, or no layout comes near.
    """
    known = stored_layers(reference)
    tried: list[Layout] = []
    for assume, unswizzled in _candidates():
        layers = diagnose(src, assume).layers
        shared = [layer for layer in layers if f"{layer}.weight" in reference.tensors]
        if not shared:
            continue
        layer = shared[0]
        target = (
            known[layer].decode(reference) if layer in known else reference.read(f"{layer}.weight").to(torch.float32)
        )
        got = _decode(layers[layer], src, unswizzled)
        if got is not None and got.shape == target.shape:
            tried.append(Layout(assume, unswizzled, layer, relative_error(target, got)))
    best = min(tried, key=lambda layout: layout.error, default=None)
    if best is None:
        raise RequestError(
            f"{reference.path}: it shares no layer with {src.path.name} that could be compared. Give the model that "
            "the file was made from."
        )
    if not best.error < _RIGHT:
        raise RequestError(
            f"{best.layer}: no layout decodes near {reference.path.name}; the nearest is {best.error:.2f} off. Give "
            "the model that the file was made from."
        )
    return best


def _decode(stored: StoredLayer, src: Source, unswizzled: bool) -> Tensor | None:
    """float32 [N, K]; None where the layout does not apply."""
    if not unswizzled:
        return stored.decode(src)
    if stored.format.pad_to == 1:
        return None
    tensors = stored.tensors(src)
    rows, cols = stored.format.scale_grid(stored.format.work_shape(stored.shape))
    if tensors["weight_scale"].shape != (rows, cols):
        return None
    tensors["weight_scale"] = swizzle_scales(tensors["weight_scale"])
    return stored.format.dequantize(tensors, stored.shape)
