"""Kept layers that are quantized already, in a form that ComfyUI does not read beside comfy_quant.

ComfyUI reads one form per file. Such a layer gets ComfyUI's own form: the same codes and scales under other names,
with a description. Where ComfyUI would not read it in that form either, it is decoded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checkpoint.header import OutputTensor
from ..checkpoint.metadata import encode_config
from ..checkpoint.source import Source
from ..errors import counted, some_of
from ..stored.canonical import canonical_config, canonical_outputs, canonical_tensors, is_canonical
from ..stored.fit import INPUT_SCALE
from ..stored.form import Form
from ..stored.layers import BitsAndBytesLayer, StoredLayer, config_tensor_name
from ..stored.legacy import marker_size
from .layer_plan import Kept, Quantized, Rewritten
from .model_rules import EMBEDDING_FORMATS, ModelRules

_DECODED = "BF16"
_FORM_IN_WORDS = {
    Form.COMFY_QUANT: "described in a way that ComfyUI does not read",
    Form.OTHER_NAME: "quantized with scales under another name",
}


def in_one_form(src: Source, layers: Sequence[Kept | Quantized], model: ModelRules) -> tuple[Kept | Quantized, ...]:
    """The layers, with every kept one that ComfyUI would not read as it is rewritten. Reads the kept ones' scales."""
    return tuple(
        _rewritten(src, layer, model) if isinstance(layer, Kept) and _is_odd(src, layer, model) else layer
        for layer in layers
    )


def written_tensors(layer: Rewritten, src: Source) -> dict[str, Tensor]:
    """{name: tensor} of its outputs. Raises InputFileError, as StoredLayer.tensor does."""
    assert layer.stored is not None
    if layer.config is None:
        return {f"{layer.layer}.weight": layer.stored.decode(src).to(torch.bfloat16)}
    return {**canonical_tensors(layer.stored, src), config_tensor_name(layer.layer): encode_config(layer.config)}


def rewriting_notes(layers: Sequence[Kept | Quantized]) -> tuple[str, ...]:
    """What was done to kept layers, in sentences."""
    rewritten = [layer for layer in layers if isinstance(layer, Rewritten)]
    described = Counter(_words(layer) for layer in rewritten if layer.config is not None)
    decoded = [layer.layer for layer in rewritten if layer.config is None]
    notes = [
        f"{counted(count, 'kept layer is', 'kept layers are')} {form}. ComfyUI reads one form per file, so they are "
        "written in its own: the same codes and scales, with a description."
        for form, count in described.items()
    ]
    if decoded:
        count = counted(len(decoded), "kept layer is", "kept layers are")
        notes.append(f"{count} decoded to bf16: {some_of(decoded, shown=3)}.")
    return tuple(notes)


def _words(layer: Rewritten) -> str:
    assert layer.stored is not None
    return _FORM_IN_WORDS.get(layer.stored.form, f"in the {layer.stored.form.value} form")


def _becomes(stored: StoredLayer) -> str:
    return "described anew" if stored.form is Form.COMFY_QUANT else f"{stored.form.value} form -> comfy_quant"


def _is_odd(src: Source, layer: Kept, model: ModelRules) -> bool:
    stored = layer.stored
    if stored is None:
        return False
    if not (_runs(stored) and is_canonical(src, stored)):
        return True
    if model.is_embedding(stored.layer) and stored.format.on_disk in EMBEDDING_FORMATS:
        return not _scales_are_sound(src, stored)
    return _unreadable(src, stored, model) is not None


def _runs(stored: StoredLayer) -> bool:
    return stored.format.refused_by_kernels(stored.shape, stored.config) is None


def _rewritten(src: Source, layer: Kept, model: ModelRules) -> Rewritten:
    stored = layer.stored
    assert stored is not None
    consumed = tuple(dict.fromkeys((*stored.names.values(), *_description(src, stored))))
    unreadable = _unreadable(src, stored, model)
    if unreadable is not None:
        outputs: tuple[OutputTensor, ...] = (OutputTensor(f"{layer.layer}.weight", _DECODED, layer.shape),)
        config, reason = None, f"{layer.reason}; decoded to bf16, as {unreadable}"
    else:
        from_marker = True if stored.form is Form.LEGACY and marker_size(src) == 2 else None
        config = canonical_config(stored, from_marker, complete=not stored.form.described or not _runs(stored))
        text = OutputTensor(config_tensor_name(layer.layer), "U8", (encode_config(config).numel(),))
        outputs, reason = (*canonical_outputs(stored), text), f"{layer.reason}; {_becomes(stored)}"
    return Rewritten(
        layer.layer,
        layer.shape,
        layer.source,
        stored,
        layer.bytes_in,
        reason,
        config=config,
        consumed=consumed,
        outputs=outputs,
    )


def _description(src: Source, stored: StoredLayer) -> tuple[str, ...]:
    name = config_tensor_name(stored.layer)
    return (name,) if name in src.tensors else ()


def _unreadable(src: Source, stored: StoredLayer, model: ModelRules) -> str | None:
    """Why ComfyUI would not read the layer in its own form, in words; None when it would."""
    other = model.not_linear(stored.layer)
    if other is not None:
        return f"it is {other}"
    misfit = stored.format.problem(stored.shape)
    if misfit is not None:
        return misfit
    if isinstance(stored, BitsAndBytesLayer) and stored.shape[1] % stored.state.block_size:
        return "its blocks run over the ends of the rows"
    if canonical_outputs(stored)[0].shape != stored.shape and model.keeps_shape(stored.layer):
        return "ComfyUI's model detection reads its shape"
    if "pre_quant_scale" in stored.names:
        return "ComfyUI does not multiply its inputs by pre_quant_scale"
    return None if _scales_are_sound(src, stored) else "its scales are not positive numbers"


def _scales_are_sound(src: Source, stored: StoredLayer) -> bool:
    """Whether the scales pass a check of the file, which does not allow NaN, Inf and negative ones.

    Raises InputFileError, as StoredLayer.tensor does.
    """
    for spec in stored.format.tensor_specs(stored.shape):
        if spec.suffix in ("weight", INPUT_SCALE.suffix) or not spec.dtype.is_floating_point:
            continue
        scales = stored.tensor(src, spec.suffix).to(torch.float32)
        if not bool(torch.isfinite(scales).all()) or (not spec.signed and bool((scales < 0).any())):
            return False
    inputs = stored.parts.get(INPUT_SCALE.suffix)
    if inputs is None or inputs.steps is None:
        return inputs is None
    return 0.0 < float(inputs.convert(src.read(inputs.found.name))) < math.inf
