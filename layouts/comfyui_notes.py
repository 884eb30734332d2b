"""What costs quality without a word from ComfyUI: weights of a quantized model that are rounded once more."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from typing import Any

log = logging.getLogger(__name__)

_MARKER = "_quantpress_notes"
_rounded: Counter[str] = Counter()  # layers that got a new weight, by format, since the last line in the log


def count_rounded(quant_format: str) -> None:
    """A layer's weight was changed and rounded into its format again."""
    _rounded[quant_format] += 1


def wrap_load() -> None:
    """One line in the log for each load of a model that rounds LoRAs or merged models into quantized layers."""
    import comfy.model_patcher

    for name in ("ModelPatcher", "ModelPatcherDynamic"):  # older ComfyUIs have the first alone
        patcher: Any = getattr(comfy.model_patcher, name, None)
        original = vars(patcher).get("load") if patcher is not None else None
        if original is not None and not getattr(original, _MARKER, False):
            patcher.load = _counting(original)
            setattr(patcher.load, _MARKER, True)


def _counting(original: Any) -> Any:
    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        _rounded.clear()
        result = original(*args, **kwargs)
        if _rounded:
            log.warning("QuantPress: %s", rounded_again(_rounded))
            _rounded.clear()
        return result

    return load


def rounded_again(layers: Counter[str]) -> str:
    """layers: how many, by format."""
    formats = ", ".join(f"{count} of {name}" for name, count in layers.most_common())
    return (
        f"a LoRA or a merged model is rounded into quantized layers ({formats}), which costs quality. Better: bake it "
        "into the 16-bit model and quantize that, or load a LoRA with Load LoRA (Bypass, Model Only)."
    )


def note_loader_dtype(model: Any) -> None:
    """One line in the log where the loader was told to store the kept weights of a quantized file in FP8."""
    text = loader_dtype_note(model)
    if text:
        log.warning("QuantPress: %s", text)


def loader_dtype_note(model: Any) -> str:
    """model: a BaseModel of ComfyUI's, after loading. "" where nothing was rounded by the loader."""
    import torch
    from comfy_kitchen.tensor import QuantizedTensor

    narrow = (torch.float8_e4m3fn, torch.float8_e5m2)
    kept, quantized = Counter[torch.dtype](), False
    for parameter in model.diffusion_model.parameters():
        if isinstance(parameter, QuantizedTensor):
            quantized = True
        elif parameter.dtype in narrow:
            kept[parameter.dtype] += 1
    if not quantized or not kept:
        return ""
    dtype = str(kept.most_common(1)[0][0]).removeprefix("torch.")
    return (
        f"the model is quantized already, and its loader's weight_dtype rounds what the file keeps in 16 bits to "
        f"{dtype} as well ({kept.total()} weights), which costs quality. Set weight_dtype to default."
    )


def notes_of(patcher: Any, with_patches: bool = True) -> list[str]:
    """Sentences about a MODEL of the graph, for a node's report. with_patches: its LoRAs and merges count."""
    patches = patcher.patches if with_patches else ()
    layers = Counter(
        module.quant_format
        for name, module in patcher.model.named_modules()
        if getattr(module, "layout_type", None) is not None and f"{name}.weight" in patches
    )
    found = [rounded_again(layers)] if layers else []
    dtype = loader_dtype_note(patcher.model) if hasattr(patcher.model, "diffusion_model") else ""
    return [*found, dtype] if dtype else found
