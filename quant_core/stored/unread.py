"""What a file holds that ComfyUI would take for something else than it is, with the words for it: for verify."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.metadata import CONFIG_SUFFIX
from ..checkpoint.source import Source
from ..errors import Problem, Remedy, counted, some_of
from .scale_names import other_scales


@dataclass(frozen=True, slots=True)
class Unread:
    """code: of verify's finding."""

    code: str
    problem: Problem


def unread(src: Source) -> list[Unread]:
    """Reads headers, and scales whose names are not ours."""
    described = {name.removesuffix(CONFIG_SUFFIX) for name in src.tensors if name.endswith(CONFIG_SUFFIX)}
    return _scale_names(src, described)


def _scale_names(src: Source, described: set[str]) -> list[Unread]:
    others, found = other_scales(src, described), []
    if others.scales:
        names = list(others.scales.values())
        text = (
            f"{counted(len(names), 'FP8 weight has its scale', 'FP8 weights have their scales')} under another name "
            f"than weight_scale: {some_of(names, shown=3)}. ComfyUI would take the codes for the weights. "
            "`quantpress migrate`, or the node Migrate Legacy File, renames them."
        )
        found.append(Unread("scale-name", Problem(text)))
    if others.doubts:
        found.append(Unread("scale-name", Problem(others.problem, "scale_name", Remedy.SAY_SCALE)))
    return found
