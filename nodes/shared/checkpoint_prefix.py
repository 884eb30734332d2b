"""Where the diffusion model of a full checkpoint is: what the names of its tensors begin with."""

from __future__ import annotations

from pathlib import Path

from ...quant_core.checkpoint.source import open_source
from ...quant_core.errors import RequestError
from .detection import checkpoint_prefix

PREFIX_TOOLTIP = (
    "What the names of the diffusion model's tensors begin with. Empty: as ComfyUI finds it, right for every "
    "checkpoint it loads. Fill it in for files of other programs, with the last dot."
)


def prefix_of(path: Path, given: str) -> str:
    """The prefix that the user gave, or the one that ComfyUI finds. RequestError when no tensor begins with it."""
    prefix = given.strip() or checkpoint_prefix(path)
    with open_source(path) as src:
        if any(name.startswith(prefix) for name in src.tensors):
            return prefix
        names = list(src.tensors)
    what = f"no tensor begins with {prefix!r}" if given.strip() else "ComfyUI finds no full checkpoint in it"
    raise RequestError(
        f"{path.name}: {what}; its tensors are called like {names[len(names) // 2]!r}. A diffusion model alone "
        "needs no such step; for a checkpoint of another program, fill in prefix."
    )
