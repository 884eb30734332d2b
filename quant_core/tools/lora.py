"""LoRA files baked into a model's weights, before it is quantized.

Whatever ComfyUI bakes is baked as ComfyUI does it: lora_adapters.py has the kinds of adapters, lora_plan.py what
is checked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..checkpoint.header import CODE_TO_TORCH
from ..checkpoint.source import Source
from ..errors import InputFileError, PlanError, Problem, counted
from .lora_changes import Change, Model
from .lora_plan import plan_lora
from .rewrite import Draft, Rewrite

RECORD_KEY = "quantpress_loras"
_SHOWN = 8  # of the quantized layers


def bake(src: Source, loras: Sequence[tuple[Source, float]], *, skip_unmatched: bool = False) -> Rewrite:
    """Every LoRA (source, strength) put into the weights in float32, and rounded once to the weight's own dtype.

    skip_unmatched: layers of a LoRA that the model has not are left out and noted; by default they are an error.
    Parts of text encoders are always left out and noted. Raises PlanError with all problems: layers the model has not,
    factors that are damaged or do not fit, kinds that no ComfyUI reads, quantized weights.
    """
    model, draft = Model(src), Draft(src)
    problems: list[str | Problem] = [] if loras else ["no LoRA was given."]
    changes: dict[str, list[Change]] = {}
    for lora, strength in loras:
        plan = plan_lora(model, lora, strength, skip_unmatched=skip_unmatched)
        problems += plan.problems
        draft.notes += plan.notes
        for tensor, change in plan.found:
            changes.setdefault(tensor, []).append(change)
    problems += list(model.refused.values())[:_SHOWN]
    if problems:
        raise PlanError(problems)
    if not changes:
        raise PlanError(
            [
                f"{lora.path}: nothing in it changes a layer of {src.path.name}. Give a LoRA of this model."
                for lora, _ in loras
            ]
        )
    for name, found in changes.items():
        draft.make(name, src.tensors[name].dtype, model.shapes[name], partial(_merged, src, name, found), of=(name,))
    draft.metadata[RECORD_KEY] = _record(src, loras)
    biases = sum(name.endswith(".bias") for name in changes)
    weights = counted(len(changes) - biases, "weight")
    draft.notes.append(
        f"{weights} and {counted(biases, 'bias', 'biases')} changed" if biases else f"{weights} changed"
    )
    return draft.finish()


def _merged(src: Source, name: str, changes: Sequence[Change]) -> Tensor:
    weight = src.read(name).to(torch.float32)
    for change in changes:
        weight = change.apply(weight)
    dtype = src.tensors[name].dtype
    merged = weight.to(CODE_TO_TORCH[dtype])
    if not bool(torch.isfinite(merged).all()):
        raise InputFileError(f"{name}: with the LoRA, weights exceed what {dtype} holds. Lower the strength.")
    return merged


def _record(src: Source, loras: Sequence[tuple[Source, float]]) -> str:
    try:
        before = json.loads(src.metadata.get(RECORD_KEY, "[]"))
    except ValueError as err:
        raise InputFileError(
            f"{src.path}: the header entry {RECORD_KEY} is not JSON ({err}). Remove it, or take another copy."
        ) from err
    if not isinstance(before, list):
        raise InputFileError(
            f"{src.path}: the header entry {RECORD_KEY} is not a list. Remove it, or take another copy."
        )
    return json.dumps(
        before
        + [{"file": lora.path.name, "hash": lora.identity_hash(), "strength": strength} for lora, strength in loras]
    )
