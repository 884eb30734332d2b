"""After loading: every layer that the file calls quantized, in a format of ours, must hold a QuantizedTensor."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from ..quant_core.checkpoint.metadata import CONFIG_SUFFIX, decode_config
from ..quant_core.errors import InputFileError, some_of
from .comfyui_formats import our_formats
from .comfyui_notes import note_loader_dtype

_MARKER = "_quantpress_audit"


def quantized_modules(root: Any) -> set[str]:
    """Names of the modules under `root` (a torch module) whose weight is a QuantizedTensor."""
    from comfy_kitchen.tensor import QuantizedTensor  # here: the seam imports this module where it may be missing

    return {
        name for name, module in root.named_modules() if isinstance(getattr(module, "weight", None), QuantizedTensor)
    }


def audit(root: Any, layers: Iterable[str], what: str) -> None:
    """InputFileError that names the layers of `layers` that `root` does not hold quantized.

    A name counts when a module's name equals it or one ends with the other: a file's keys may carry a prefix, and some
    architectures are renamed while they load.
    """
    layers, held = list(layers), quantized_modules(root)
    lost = [
        layer
        for layer in layers
        if layer not in held and not any(layer.endswith("." + name) or name.endswith("." + layer) for name in held)
    ]
    if lost and len(held) < len(layers):
        raise InputFileError(
            f"{what}: {len(lost)} of {len(layers)} quantized layers did not arrive as quantized weights: "
            f"{some_of(lost)}. ComfyUI builds them from a class that cannot hold them, or another pack took "
            "the model over. Use 'Load Quantized Diffusion Model', or quantize with these layers kept."
        )


def wrap_load_model_weights() -> None:
    """Audit every diffusion model that ComfyUI loads: layers that match no module would only be a line in its log."""
    import comfy.model_base

    original = getattr(comfy.model_base.BaseModel, "load_model_weights", None)
    if original is None or getattr(original, _MARKER, False):
        return

    @functools.wraps(original)
    def load_model_weights(self: Any, sd: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        layers = our_layers(sd)  # before, because loading empties the dict
        result = original(self, sd, *args, **kwargs)
        if layers:
            audit(self.diffusion_model, layers, type(self).__name__)
        note_loader_dtype(self)
        return result

    setattr(load_model_weights, _MARKER, True)
    comfy.model_base.BaseModel.load_model_weights = load_model_weights


def our_layers(state_dict: dict[str, Any]) -> list[str]:
    """Layers whose comfy_quant entry names a format that the seam loads."""
    ours, found = our_formats(), []
    for key in list(state_dict):
        layer = key.removesuffix(CONFIG_SUFFIX)
        if layer != key and decode_config(state_dict[key], layer, lenient=True)[0]["format"] in ours:
            found.append(layer)
    return found
