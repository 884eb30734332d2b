"""What a file is, in a few words, for tools that find nothing to do in it."""
from __future__ import annotations

from collections import Counter

from ..checkpoint.families import refusal
from ..checkpoint.layers import stored_layers
from ..checkpoint.source import Source
from ..errors import InputFileError, RequestError, counted
from ..plan import linear_layers

OWN_FORM = "comfy_quant"


def describe(src: Source) -> str:
    """ "its 6 quantized layers are in ComfyUI's own form (int8_rowwise)", or what else it holds; no path, no full stop."""
    stored = stored_layers(src)
    if not stored:
        kept = Counter(src.tensors[f"{layer}.weight"].dtype for layer in linear_layers(src, stored))
        plain = ", ".join(f"{count} in {dtype}" for dtype, count in kept.most_common())
        return f"nothing in it is quantized; its linear layers: {plain or 'none'}"
    forms = Counter((entry.kind, entry.format.name) for entry in stored.values())
    if {kind for kind, _ in forms} == {OWN_FORM}:
        names = ", ".join(name for _, name in forms)
        return f"its {counted(len(stored), 'quantized layer is', 'quantized layers are')} in ComfyUI's own form ({names})"
    return "it holds " + ", ".join(f"{counted(count, 'layer')} of the {kind} form ({name})" for (kind, name), count in forms.items())


def require_model(src: Source) -> None:
    """InputFileError for a LoRA, a calibration, one shard of several, or a file of a foreign quantizer."""
    foreign = refusal(src)
    if foreign is not None:
        raise InputFileError(foreign)


def nothing_to_migrate(src: Source) -> str:
    """Why `migrate` would change nothing, and what to do instead: sentences without the path."""
    stored = stored_layers(src)
    what = describe(src)
    if not stored:
        return f"{what}. There is nothing to migrate: quantize it, or use it as it is."
    return f"{what}. There is nothing to migrate: use it as it is."


def require_bitsandbytes(src: Source) -> None:
    """RequestError when no layer is stored in bitsandbytes' way, so that there is nothing to import."""
    kinds = {entry.kind for entry in stored_layers(src).values()}
    if "bitsandbytes" in kinds:
        return
    if not kinds:
        require_model(src)
    foreign = kinds - {OWN_FORM}
    instead = ("`quantpress migrate`, or the node Migrate Legacy File, converts such a file." if foreign else
               "Use it as it is." if kinds else "Quantize it, or use it as it is.")
    raise RequestError(f"{src.path}: no layer of it is stored in bitsandbytes' way, so there is nothing to import: {describe(src)}. "
                       f"{instead}")
