"""What stands before a layer's own name, in checkpoints, in module trees and in LoRAs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

MODEL_PREFIX = "model.diffusion_model."  # of the diffusion model in a full checkpoint
BARE_MODEL_PREFIX = "diffusion_model."  # of the same model alone, as ComfyUI's LoRA loaders look its layers up

# The three lists go from long to short: `model.diffusion_model.` must be tried before `model.`.
# Of checkpoints. A name has one of them at most.
CHECKPOINT_PREFIXES = (MODEL_PREFIX, BARE_MODEL_PREFIX, "transformer.", "model.", "net.")
# Of anything that names layers, LoRAs included. Several may stand in a row.
ANY_PREFIXES = ("base_model.model.", MODEL_PREFIX, BARE_MODEL_PREFIX, "transformer.", "unet.", "net.", "model.")
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


def strip_prefix(name: str) -> str:
    """The name without its checkpoint prefix."""
    return name[len(checkpoint_prefix(name)) :]


def checkpoint_prefix(name: str) -> str:
    """The one of CHECKPOINT_PREFIXES that the name begins with; "" when there is none."""
    return next((prefix for prefix in CHECKPOINT_PREFIXES if name.startswith(prefix)), "")


def strip_prefixes(name: str) -> str:
    """The name without any of ANY_PREFIXES before it."""
    while True:
        found = next((prefix for prefix in ANY_PREFIXES if name.startswith(prefix) and len(name) > len(prefix)), None)
        if found is None:
            return name
        name = name[len(found) :]


def lora_name(layer: str) -> str:
    """The layer as ComfyUI's LoRA loaders look it up. layer: as in the checkpoint."""
    for prefix in (MODEL_PREFIX, BARE_MODEL_PREFIX):
        if layer.startswith(prefix):
            return BARE_MODEL_PREFIX + layer.removeprefix(prefix)
    return BARE_MODEL_PREFIX + layer


def prefix_changes() -> Iterator[Callable[[str], str]]:
    """Adding, and removing, each prefix that checkpoints have."""
    for prefix in CHECKPOINT_PREFIXES:
        yield prefix.__add__
        yield _remover(prefix)


def _remover(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)
