"""Where the diffusion model of a full checkpoint is: what the names of its tensors begin with."""

from __future__ import annotations

from pathlib import Path

from ...quant_core.checkpoint.source import open_source
from ...quant_core.tools.merge import model_prefix
from .detection import checkpoint_prefix

PREFIX_TOOLTIP = (
    "What the names of the diffusion model's tensors begin with. Empty: as ComfyUI or QuantPress finds it. Fill it in "
    "for files of other programs, with the last dot."
)


def prefix_of(path: Path, given: str) -> str | None:
    """The prefix that the user gave, or the one that is found; None when none is, which the engine's error says."""
    if given.strip():
        return given.strip()
    with open_source(path) as src:
        known = model_prefix(src)
        if known is not None:
            return known
        prefix = checkpoint_prefix(path)
        return prefix if any(name.startswith(prefix) for name in src.tensors) else None
