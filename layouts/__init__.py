"""QuantizedTensor layouts: how quantized layers run inside torch. Needs comfy-kitchen; never imports nodes."""

from __future__ import annotations

from typing import Any

__all__ = ["Ability", "ability", "layout_classes", "path", "register_layouts", "tensor_of_layer"]


def __getattr__(name: str) -> Any:
    # On first use, not at import: where comfy-kitchen is not there, the seam (comfyui.py) must load and say so.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import capability, registry

    return getattr(capability if hasattr(capability, name) else registry, name)
