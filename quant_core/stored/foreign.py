"""Files that are not models this pack can work with: what they are, and what to do.

Told apart by names, nothing is read.
"""

from __future__ import annotations

import re

from ..checkpoint.source import Source
from ..checkpoint.suffixes import INDEX_SUFFIX
from ..names.lora_parts import Kind, lora_tensor
from .families import family_problem
from .unread import codes_problem

CALIBRATION_KEY = "quantpress_calibration"
_ADAPTER = re.compile(r"\.(lora[._]|hada_|lokr_|oft_)")
_SHARD = re.compile(r"-(?P<number>\d+)-of-(?P<of>\d+)\.safetensors$")


def is_lora(src: Source) -> bool:
    """Whether all its tensors are factors of a LoRA or of its kin."""
    found = [lora_tensor(name) for name in src.tensors]
    known = all(one or _ADAPTER.search(name) for one, name in zip(found, src.tensors, strict=True))
    return known and any(one is None or one.kind is not Kind.ANY for one in found)


def part_of(src: Source) -> tuple[int, int] | None:
    """(number, of how many) for one shard of several that was given alone."""
    alone = _SHARD.search(src.path.name) if len(src.files) == 1 else None
    return None if alone is None or int(alone["of"]) < 2 else (int(alone["number"]), int(alone["of"]))


def refusal(src: Source) -> str | None:
    """Sentences that say what the file is and what to do; None when this pack can work with it."""
    if CALIBRATION_KEY in src.metadata:
        return (
            f"{src.path}: this file is a calibration: it holds what flows into a model's layers, and no weights. "
            "Give the model here, and this file as its calibration."
        )
    if is_lora(src):
        return (
            f"{src.path}: this file is a LoRA: it changes a model's weights and holds none of its own. Give the model "
            "here; `quantpress merge lora`, or the node Bake LoRA, puts the LoRA into it."
        )
    if (part := part_of(src)) is not None:
        return (
            f"{src.path}: this is shard {part[0]} of {part[1]}, a part of the model. Give the *{INDEX_SUFFIX} "
            "beside it, or the folder."
        )
    problem = family_problem(src) or codes_problem(src)
    return None if problem is None else f"{src.path}: {problem}"
