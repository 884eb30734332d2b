"""A MODEL of the graph, written to a spool file: a source like any file.

The keys are those of a saved checkpoint.
"""

from __future__ import annotations

import os
import secrets
import uuid
from pathlib import Path
from typing import Any

from comfy import model_management

from ...layouts import comfyui as seam
from ...layouts.comfyui_notes import notes_of
from ...quant_core.checkpoint.header import TORCH_TO_CODE, OutputTensor
from ...quant_core.checkpoint.sink import open_sink
from ...quant_core.errors import RequestError, counted
from ...quant_core.progress import Progress
from ..shared.decoded_patches import DecodedPatches
from ..shared.handles import QuantizedHandle, SourceHandle, origins_of
from ..shared.progress import NodeProgress
from ..shared.spool import spool_folder, sweep


def write_source(model: Any, bake_patches: bool, progress: NodeProgress) -> SourceHandle:
    """model: a ModelPatcher. bake_patches: with its LoRAs, merged in float32 and rounded to the weight's dtype.

    One weight is in memory at a time beside the model. A quantized weight is written as it is, and the engine decodes
    it with its own scales; where a LoRA changes it, decoded, so that the sum is not rounded twice.
    """
    if not bake_patches:
        model = model.clone()
        # A new id with the empty patches: by it ComfyUI sees that weights patched in place must be restored.
        model.patches, model.patches_uuid = {}, uuid.uuid4()
    decoded = DecodedPatches(model)
    # As ComfyUI's own savers do: it takes patches of another clone out of the shared weights.
    model_management.load_models_gpu([decoded.base])
    state = decoded.base.state_dict_for_saving()
    baked = decoded.take(state)
    sweep()
    label = type(model.model.model_config).__name__.lower() if hasattr(model.model, "model_config") else "model"
    target = spool_folder() / f"source-{label}-{secrets.token_hex(6)}.safetensors"
    entries = [OutputTensor(name, _code(name, value), tuple(value.shape)) for name, value in state.items()]
    total = sum(value.numel() * value.element_size() for value in state.values())
    with open_sink(target, entries, {"format": "pt"}) as sink:
        written = 0
        for index, name in enumerate(list(state)):
            value = state.pop(name)  # popped, so that a baked weight goes as soon as it is written
            written += value.numel() * value.element_size()
            sink.write(name, (decoded.weight(baked[name]) if name in baked else value).to("cpu"))
            progress(Progress(name, index + 1, len(entries), written, total, 0.0, None))
        sink.commit()
    return SourceHandle(target, label, "Model from Graph", _files(model))


def describe(source: SourceHandle, model: Any, bake_patches: bool) -> str:
    """What was written, and what it has lost already."""
    notes = notes_of(model, with_patches=False) if seam.status().installed else []
    changed = len(DecodedPatches(model).keys) if bake_patches else 0
    if changed:
        layers = counted(changed, "quantized layer is", "quantized layers are")
        notes = [
            f"{layers} written decoded, with what LoRAs and merges add. The 16-bit model would lose less.",
            *notes,
        ]
    size = f"{source.label}: {source.path.stat().st_size / 1e9:.3f} GB"
    return "\n".join([size, *(f"note: {text}" for text in notes)])


def _files(model: Any) -> tuple[Path, ...]:
    """The files that the model was loaded from, as far as ComfyUI's loader, or ours, remembers them."""
    _, args, *_ = getattr(model, "cached_patcher_init", None) or (None, ())
    texts = [text for arg in args for text in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    files = tuple(Path(text) for text in texts if isinstance(text, str) and os.path.isfile(text))
    handle = model.get_attachment("quantpress")
    return (*files, *origins_of(handle)) if isinstance(handle, QuantizedHandle) else files


def _code(name: str, value: Any) -> str:
    if value.dtype not in TORCH_TO_CODE:
        raise RequestError(
            f"{name} is {value.dtype}, which no safetensors file can hold. Quantize the model's file instead."
        )
    return TORCH_TO_CODE[value.dtype]
