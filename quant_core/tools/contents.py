"""What a file is, in a few words, for tools that find nothing to do in it."""

from __future__ import annotations

from collections import Counter

from ..checkpoint.source import Source
from ..errors import InputFileError, counted
from ..pipeline.layer_plan import linear_layers
from ..stored.foreign import refusal
from ..stored.form import Form
from ..stored.layers import stored_layers


def describe(src: Source) -> str:
    """ "its 6 quantized layers are in ComfyUI's own form (int8_rowwise)", or what else it holds.

    No path, no full stop.
    """
    stored = stored_layers(src)
    if not stored:
        kept = Counter(src.tensors[f"{layer}.weight"].dtype for layer in linear_layers(src, stored))
        plain = ", ".join(f"{count} in {dtype}" for dtype, count in kept.most_common())
        return f"nothing in it is quantized; its linear layers: {plain or 'none'}"
    forms = Counter((entry.form, entry.format.name) for entry in stored.values())
    if {form for form, _ in forms} == {Form.COMFY_QUANT}:
        names = ", ".join(name for _, name in forms)
        return (
            f"its {counted(len(stored), 'quantized layer is', 'quantized layers are')} in ComfyUI's own form ({names})"
        )
    return "it holds " + ", ".join(
        f"{counted(count, 'layer')} of the {form.value} form ({name})" for (form, name), count in forms.items()
    )


def require_model(src: Source) -> None:
    """InputFileError for a LoRA, a calibration, one shard of several, or a file of a foreign quantizer."""
    foreign = refusal(src)
    if foreign is not None:
        raise InputFileError(foreign)


def nothing_to_migrate(src: Source) -> str:
    """Why `migrate` would change nothing, and what to do instead.

    Sentences without the path.
    """
    stored = stored_layers(src)
    what = describe(src)
    if not stored:
        return f"{what}. There is nothing to migrate: quantize it, or use it as it is."
    return f"{what}. There is nothing to migrate: use it as it is."


def holds_bitsandbytes(src: Source) -> bool:
    """Whether a layer is stored in bitsandbytes' way. InputFileError for what is not a model at all."""
    forms = {entry.form for entry in stored_layers(src).values()}
    if not forms:
        require_model(src)
    return Form.BITSANDBYTES in forms


def nothing_to_import(src: Source) -> str:
    """What a file is that has no layer in bitsandbytes' structure, and what to do instead.

    Sentences without the path.
    """
    forms = {entry.form for entry in stored_layers(src).values()}
    instead = (
        "`quantpress migrate`, or the node Migrate Legacy File, converts such a file."
        if forms - {Form.COMFY_QUANT}
        else "Use it as it is."
        if forms
        else "Quantize it, or use it as it is."
    )
    return f"no layer of it is stored in bitsandbytes' way, so there is nothing to import: {describe(src)}. {instead}"
