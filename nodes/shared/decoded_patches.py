"""LoRAs and merges on quantized weights, added to the decoded weight and not rounded into its format again."""

from __future__ import annotations

import uuid
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import torch

from ...quant_core.stored.suffixes import QUANT_SUFFIXES


class DecodedPatches:
    """base: the model without the patches of its quantized weights, to be loaded and saved. keys: those weights."""

    def __init__(self, model: Any) -> None:
        self.keys = [key for key in model.patches if _is_quantized(_weight(model, key))]
        self._patches = {key: model.patches[key] for key in self.keys}
        self.base = model
        if self.keys:
            self.base = model.clone()
            self.base.patches = {key: patches for key, patches in model.patches.items() if key not in self._patches}
            # A new id with the other patches: by it ComfyUI sees that weights patched in place must be restored.
            self.base.patches_uuid = uuid.uuid4()

    def take(self, state: dict[str, Any]) -> dict[str, str]:
        """Replace the pieces of each such weight in a state dict of `base` by one tensor without data.

        Returns {its name there: the key}. The rest of the layer's entries stay.
        """
        quantized = {id(_weight(self.base, key)._qdata): key for key in self.keys}
        lazy = getattr(comfy.model_patcher, "LazyCastingParamPiece", ())
        names: dict[str, str] = {}
        for name, value in state.items():
            key = value.caster.key if isinstance(value, lazy) else quantized.get(id(value))
            if key is not None and key in self._patches and name.endswith(".weight"):
                names[name] = key
        for name, key in names.items():
            for suffix in QUANT_SUFFIXES:
                state.pop(f"{name.removesuffix('weight')}{suffix}", None)
            weight = _weight(self.base, key)
            state[name] = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        return names

    def weight(self, key: str) -> Any:
        """The decoded weight with its patches, added in float32, in the dtype that the model computes in."""
        weight, _, convert = comfy.model_patcher.get_key_weight(self.base.model, key)
        decoded = comfy.model_management.cast_to_device(weight, self.base.load_device, torch.float32, copy=True)
        decoded = convert(decoded, inplace=True)
        return comfy.lora.calculate_weight(self._patches[key], decoded, key).to(weight.dtype)


def _weight(model: Any, key: str) -> Any:
    return comfy.model_patcher.get_key_weight(model.model, key)[0]


def _is_quantized(weight: Any) -> bool:
    return hasattr(weight, "_qdata")  # comfy-kitchen's QuantizedTensor, also where that is not installed
