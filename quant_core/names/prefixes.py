"""What stands before a layer's own name, in checkpoints, in module trees and in LoRAs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

MODEL_PREFIX = "model.diffusion_model."  # of the diffusion model in a full checkpoint
BARE_MODEL_PREFIX = "diffusion_model."  # of the same model alone, as ComfyUI's LoRA loaders look its layers up

# What ComfyUI takes off (unet_prefix_from_state_dict in comfy/model_detection.py).
COMFYUI = (MODEL_PREFIX, "model.model.", "net.", "model.")
# What training code and other programs put there; ComfyUI takes none of them off.
WRAPPERS = (
    "_checkpoint_wrapped_module.",
    "_forward_module.",
    "_fsdp_wrapped_module.",
    "_orig_mod.",
    "base_model.model.",
    BARE_MODEL_PREFIX,
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
# What wrappers of single blocks leave in the middle of a name.
INNER = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")
# From long to short: `model.diffusion_model.` must be tried before `model.`.
_ALL = tuple(sorted({*COMFYUI, *WRAPPERS}, key=len, reverse=True))
# Kohya-type LoRAs join names with underscores after one of these.
UNDERSCORE_PREFIXES = (
    "lora_unet__",  # Wan Fun
    "lora_unet_",
    "lora_transformer_",
    "lora_prior_unet_",
    "lycoris_unet_",
    "lycoris_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lora_te_",
)
TEXT_ENCODER = re.compile(
    r"^(lora_te\d?_|lora_prior_te_|lora_t5|text_encoders?[._]|text_encoder_\d[._]|te\d?_|clip_[lg]\.|t5xxl\.)"
)


def prefixes_of(name: str) -> Iterator[str]:
    """What may be the prefix of this name: its first known part, the first two together, and so on."""
    prefix = ""
    while (part := next((part for part in _ALL if name.startswith(part, len(prefix))), None)) is not None:
        prefix += part
        if len(prefix) == len(name):
            return
        yield prefix


def known_prefix(name: str) -> str:
    """All known parts that the name begins with; "" when there is none."""
    return max(prefixes_of(name), key=len, default="")


def strip_prefix(name: str) -> str:
    """The name without any known part before it."""
    return name[len(known_prefix(name)) :]


def unwrapped(name: str) -> str:
    """The name without what wrappers of single blocks left inside it. What stands before it stays."""
    prefix = known_prefix(name)
    own = name[len(prefix) :]
    for part in INNER:
        own = own.replace(f".{part}", ".")
    return prefix + own


def lora_name(layer: str) -> str:
    """The layer as ComfyUI's LoRA loaders look it up. layer: as in the checkpoint."""
    for prefix in (MODEL_PREFIX, BARE_MODEL_PREFIX):
        if layer.startswith(prefix):
            return BARE_MODEL_PREFIX + layer.removeprefix(prefix)
    return BARE_MODEL_PREFIX + layer


def prefix_changes() -> Iterator[Callable[[str], str]]:
    """Adding, and removing, each known prefix."""
    for prefix in _ALL:
        yield prefix.__add__
        yield _remover(prefix)


def _remover(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)
