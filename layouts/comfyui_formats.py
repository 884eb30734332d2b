"""Which formats ComfyUI loads by itself, and which the seam loads; and the entries of ours in ComfyUI's table."""

from __future__ import annotations

import logging

from ..quant_core.formats import all_formats
from ..quant_core.formats.base import Format

log = logging.getLogger(__name__)

MARKER = "_quantpress_seam"  # on everything of ComfyUI's that the seam has wrapped or added


def native_formats() -> frozenset[str]:
    """Names on disk that this ComfyUI loads by itself."""
    from comfy.quant_ops import QUANT_ALGOS

    return frozenset(name for name, entry in QUANT_ALGOS.items() if not entry.get(MARKER))


def our_formats() -> dict[str, Format]:
    """{name on disk: Format} of what the seam loads.

    Those are the formats of this pack, and those that only a newer ComfyUI knows, where the installed comfy-kitchen
    has their layout.
    """
    from comfy_kitchen.tensor.base import LAYOUTS

    native = native_formats()
    return {
        fmt.on_disk: fmt
        for fmt in all_formats()
        if fmt.runtime.layout in LAYOUTS and (fmt.runtime.native_since is None or fmt.on_disk not in native)
    }


def register_formats() -> tuple[str, ...]:
    """An entry of our own in QUANT_ALGOS for every format the seam loads, since Linear.forward looks there."""
    from comfy.quant_ops import QUANT_ALGOS

    ours = our_formats()
    for name, fmt in ours.items():
        entry = QUANT_ALGOS.setdefault(
            name,
            {
                "storage_t": fmt.tensor_specs(fmt.smallest_shape)[0].dtype,
                "parameters": set(fmt.suffixes) - {"weight"},
                "comfy_tensor_layout": fmt.runtime.layout,
                "quantize_input": False,
                MARKER: True,
            },
        )
        if not entry.get(MARKER):
            log.warning(
                "QuantPress: another pack has registered the format %s; files of it may be run by that pack.", name
            )
    return tuple(ours)
