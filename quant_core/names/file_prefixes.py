"""What stands before the names of a model's tensors: ComfyUI's own prefixes, and those that wrappers leave."""

from __future__ import annotations

from collections.abc import Iterable

# What ComfyUI takes off (unet_prefix_from_state_dict in comfy/model_detection.py). The first three win by number.
COMFYUI = ("model.diffusion_model.", "model.model.", "net.", "model.")
_MORE_THAN = 5  # names, below which ComfyUI does not believe in one of the first three

# What training code and other programs put there; ComfyUI takes none of them off.
WRAPPERS = (
    "_fsdp_wrapped_module.",
    "_orig_mod.",
    "base_model.model.",
    "diffusion_model.",
    "dit.",
    "ema.",
    "ema_model.",
    "generator.",
    "model_ema.",
    "module.",
    "online_model.",
    "pipe.dit.",
    "state_dict.",
    "student.",
    "transformer.",
    "unet.",
)
_ALL = tuple(sorted({*COMFYUI, *WRAPPERS}, key=len, reverse=True))


def possible_prefixes(names: Iterable[str]) -> list[str]:
    """Every prefix, "" first, that some name can have: known ones in a row. The longest known part goes first."""
    found: dict[str, None] = {"": None}
    for name in names:
        prefix = ""
        while (part := next((part for part in _ALL if name.startswith(part, len(prefix))), None)) is not None:
            prefix += part
            found[prefix] = None
    return list(found)


def prefix_for_comfyui(names: Iterable[str]) -> str:
    """What ComfyUI takes off the names of a diffusion model's tensors; "" where nothing begins with it."""
    listed = list(names)
    *first, last = COMFYUI
    counts = dict.fromkeys(first, 0)
    for name in listed:
        prefix = next((prefix for prefix in first if name.startswith(prefix)), None)
        if prefix is not None:
            counts[prefix] += 1
    top = max(first, key=lambda prefix: counts[prefix])
    chosen = top if counts[top] > _MORE_THAN else last
    return chosen if any(name.startswith(chosen) for name in listed) else ""
