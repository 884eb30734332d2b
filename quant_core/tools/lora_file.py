"""The tensors of a LoRA file sorted by layer, and which of them ComfyUI takes where a layer has several kinds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..checkpoint.source import Source
from ..names.lora_parts import Kind, LoraTensor, lora_tensor
from ..names.prefixes import TEXT_ENCODER
from .lora_adapters import ADAPTERS

Parts = dict[tuple[Kind, str], str]  # {(kind, part): tensor}
# Of a full difference, by what is changed; the first that is there counts.
_WHOLE = {"weight": ("set_weight", "diff", "w_norm"), "bias": ("diff_b", "b_norm", "up_bias")}
_CONTROL = ("img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One change that a file asks for. of: "weight" or "bias". part: of a full difference, else "".

    names: {part: tensor}, what it is made from. passed: kinds that the file has for the same weight, and that do not
    count beside this one.
    """

    of: str
    kind: Kind
    names: dict[str, str]
    part: str = ""
    passed: tuple[Kind, ...] = ()


@dataclass(slots=True)
class LoraFile:
    """layers: {layer as the LoRA names it: its parts}. strangers: tensors whose names say nothing.

    unread: {kind: tensors} in a form that ComfyUI does not read. control: one of Flux's control LoRAs, as Black Forest
    Labs publishes them: it widens img_in and replaces the norms' scales.
    """

    src: Source
    layers: dict[str, Parts] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)
    unread: dict[Kind, list[str]] = field(default_factory=dict)
    control: bool = False


def read_lora_file(src: Source) -> LoraFile:
    """Headers only."""
    file = LoraFile(src, control=all(name in src.tensors for name in _CONTROL))
    for name in src.tensors:
        found = lora_tensor(name)
        if file.control and name.endswith("_norm.scale"):
            found = LoraTensor(name.removesuffix(".scale"), Kind.FULL, "set_weight")
        if found is None:
            file.strangers.append(name)
        elif found.part is not None:
            file.layers.setdefault(found.base, {})[(found.kind, found.part)] = name
        elif not TEXT_ENCODER.match(found.base):
            file.unread.setdefault(found.kind, []).append(name)
    return file


def candidates(parts: Parts) -> Iterator[Candidate]:
    """The changes of one layer. Of several kinds for one weight ComfyUI takes the last that it reads, and so do we."""
    shared = {part: name for (kind, part), name in parts.items() if kind is Kind.ANY}
    kinds = [kind for kind in ADAPTERS if any(of is kind and part != "up_bias" for of, part in parts)]
    whole = {part: name for (_, part), name in parts.items()}
    for of, names in _WHOLE.items():
        found = next((part for part in names if part in whole), None)
        if found is not None:
            needed = (found, "down", "alpha") if found == "up_bias" else (found,)
            passed = tuple(kinds) if of == "weight" else ()
            yield Candidate(of, Kind.FULL, {part: whole[part] for part in needed if part in whole}, found, passed)
        elif of == "weight" and kinds:
            own = {part: name for (kind, part), name in parts.items() if kind is kinds[-1] and part != "up_bias"}
            yield Candidate(of, kinds[-1], own | shared, "", tuple(kinds[:-1]))
