"""Reading a LoRA's tensor names: which layer, which factor, whatever tool wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from ..errors import InputFileError, some_of
from .layer_names import LayerNames
from .lora_parts import Kind, lora_tensor
from .prefixes import TEXT_ENCODER


class Factor(Enum):
    """DOWN is LoRA_A [rank, in_features], UP is LoRA_B [out_features, rank]. BESIDE: DoRA magnitudes, biases, mids."""

    DOWN = "down"
    UP = "up"
    ALPHA = "alpha"
    BESIDE = "beside"


@dataclass(frozen=True, slots=True)
class LoraKey:
    """base: the layer as the LoRA names it, without the factor."""

    base: str
    factor: Factor


@dataclass(frozen=True, slots=True)
class LoraIndex:
    """Where a LoRA's factors are. down, up, alpha: {layer of the model: names of tensors}, parts of a layer in a row.

    unresolved: layers that the model does not have. text_encoder: how many of its layers are a text encoder's.
    """

    down: dict[str, tuple[str, ...]]
    up: dict[str, tuple[str, ...]]
    alpha: dict[str, tuple[str, ...]]
    unresolved: tuple[str, ...]
    text_encoder: int


def parse_lora_key(name: str) -> LoraKey | str | None:
    """The layer and factor of a tensor; the name of another kind ("LoHa"); None when the name says neither."""
    found = lora_tensor(name)
    if found is None:
        return None
    if found.kind not in (Kind.LORA, Kind.ANY):
        return found.kind.value
    factor = next((factor for factor in Factor if factor.value == found.part), Factor.BESIDE)
    return LoraKey(found.base, factor)


def index_lora(tensor_names: Iterable[str], layers: LayerNames, path: str) -> LoraIndex:
    """Sort a LoRA's tensors by layer. path: for messages.

    Raises InputFileError: another kind of adapter, no LoRA at all, or none of its layers is the model's.
    """
    tables: dict[Factor, dict[str, list[str]]] = {factor: {} for factor in Factor}
    unresolved: dict[str, None] = {}
    text_encoder: set[str] = set()
    other: dict[str, str] = {}
    for name in tensor_names:
        key = parse_lora_key(name)
        if isinstance(key, str):
            other.setdefault(key, name)
            continue
        if key is None:
            continue
        layer = layers.resolve(key.base)
        if layer is not None:
            tables[key.factor].setdefault(layer, []).append(name)
        elif TEXT_ENCODER.match(key.base):
            text_encoder.add(key.base)
        else:
            unresolved[key.base] = None
    down = tables[Factor.DOWN]
    if other and not down:
        found = ", ".join(f"{kind} ({name})" for kind, name in other.items())
        raise InputFileError(
            f"{path}: this adapter is {found}, not a plain LoRA: it has no LoRA_A whose rows are input "
            "directions. Give a LoRA, or calibrate from a captured run."
        )
    if not down:
        why = (
            f"none of its layers is the model's: {some_of(list(unresolved), shown=3)}"
            if unresolved
            else "all of its layers are a text encoder's"
            if text_encoder
            else "it holds no LoRA_A or lora_down tensor"
        )
        raise InputFileError(
            f"{path}: this LoRA gives no input directions for the model: {why}. Give a LoRA of this model."
        )
    frozen = {factor: {layer: tuple(names) for layer, names in table.items()} for factor, table in tables.items()}
    return LoraIndex(
        frozen[Factor.DOWN], frozen[Factor.UP], frozen[Factor.ALPHA], tuple(unresolved), len(text_encoder)
    )
