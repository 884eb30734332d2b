"""What one LoRA file changes in a model, and all that is wrong with it, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..checkpoint.source import Source
from ..errors import InputFileError, Problem, Remedy, RequestError, counted, some_of
from ..names.layer_names import Place
from ..names.prefixes import TEXT_ENCODER
from .lora_changes import Change, Model
from .lora_checks import change_of
from .lora_file import Candidate, LoraFile, candidates, read_lora_file

_SHOWN = 8  # of the layers that cannot be baked
_OTHER_WAY = "Give a LoRA of this model; where ComfyUI's Load LoRA takes it, put the node Model from Graph behind that"
_ITS_TOOL = "Merge it with the tool that trained it (peft: merge_and_unload)."


@dataclass(slots=True)
class LoraPlan:
    """found: (tensor, change) in the file's order. problems, notes: in whole sentences."""

    found: list[tuple[str, Change]] = field(default_factory=list)
    problems: list[str | Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan_lora(model: Model, lora: Source, strength: float, *, skip_unmatched: bool) -> LoraPlan:
    """skip_unmatched: what the model has not, and tensors that are of no LoRA, are notes and no problems."""
    plan, where, file = LoraPlan(), lora.path.name, read_lora_file(lora)
    if not math.isfinite(strength):
        plan.problems.append(f"{where}: the strength is {strength}. Give a number.")
    elif not file.layers and not file.unread:
        plan.problems.append(
            f"{where}: this is not a LoRA: none of its {counted(len(lora.tensors), 'tensor')} is a factor of one; "
            f"they are called like {next(iter(lora.tensors), '')!r}. Give the file of a LoRA."
        )
    if plan.problems:
        return plan
    layers = _Layers(model, file, strength)
    text = [base for base in file.layers if TEXT_ENCODER.match(base)]
    for base in file.layers:
        if base not in text:
            layers.add(base)
    if layers.found or layers.unknown or layers.refused:
        layers.text = text
    else:  # the LoRA of a text encoder, into one
        for base in text:
            layers.add(base)
    plan.found = layers.found
    for kind, names in file.unread.items():
        plan.problems.append(
            f"{where}: {some_of(names, shown=2)}: a form of {kind.value} that ComfyUI cannot read. {_ITS_TOOL}"
        )
    strangers = counted(len(file.strangers), "tensor is", "tensors are")
    unknown = counted(len(layers.unknown), "layer is", "layers are")
    for what, names in (
        (f"{strangers} no part of a LoRA that is known", file.strangers),
        (f"{unknown} not in {model.src.path.name}", layers.unknown),
    ):
        if names and skip_unmatched:
            plan.notes.append(f"{where}: {what}: {some_of(names, shown=4)}. Left out.")
        elif names:
            sentence = f"{where}: {what}: {some_of(names, shown=4)}. {_OTHER_WAY}."
            plan.problems.append(Problem(sentence, "skip_unmatched", Remedy.LEAVE_OUT))
    plan.problems += [f"{where}: {text}" for text in layers.refused[:_SHOWN]]
    if len(layers.refused) > _SHOWN:
        plan.problems.append(
            f"{where}: {len(layers.refused) - _SHOWN} more of its changes are refused for such reasons."
        )
    plan.notes += [f"{where}: {text}" for text in layers.notes()]
    return plan


@dataclass(slots=True)
class _Layers:
    """Goes through the layers of one LoRA. unknown: those that the model has not. refused: sentences.

    empty: layers of rank 0. several: layers with more than one kind of change for a weight.
    """

    model: Model
    file: LoraFile
    strength: float
    found: list[tuple[str, Change]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    several: list[str] = field(default_factory=list)

    def add(self, base: str) -> None:
        try:
            place = self.model.names.find(base)
            if place is None:
                (self.text if TEXT_ENCODER.match(base) else self.unknown).append(base)
                return
            for candidate in candidates(self.file.layers[base]):
                self._add_change(base, place, candidate)
        except (InputFileError, RequestError) as err:
            self.refused.append(str(err))

    def _add_change(self, base: str, place: Place, candidate: Candidate) -> None:
        tensor = self.model.tensor(place.layer, candidate.of)
        if tensor is None:
            self.unknown.append(f"{base} (its {candidate.of})")
            return
        if not self.model.takes_changes(tensor):
            return
        weight = self.model.weight_shape(place.layer)
        reshaped = self.file.control and base.endswith("img_in")
        change = change_of(
            self.file.src, base, candidate, place, (self.model.shapes[tensor], weight), self.strength, widen=reshaped
        )
        if candidate.passed:
            self.several.append(base)
        if change is None:
            self.empty.append(base)
            return
        self.found.append((tensor, change))
        self.model.shapes[tensor] = change.reshape or self.model.shapes[tensor]

    def notes(self) -> list[str]:
        found = []
        if self.text:
            found.append(_told(self.text, "layer of a text encoder is", "layers of a text encoder are") + " left out.")
        if self.empty:
            these = _told(self.empty, "layer has rank 0 and changes", "layers have rank 0 and change")
            found.append(f"{these} nothing: {some_of(self.empty, shown=4)}.")
        if self.several:
            these = _told(self.several, "layer has", "layers have")
            found.append(f"{these} several kinds of change; the one that ComfyUI takes is baked.")
        return found


def _told(names: Sequence[str], one: str, many: str) -> str:
    return counted(len(names), one, many)
