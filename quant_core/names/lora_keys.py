"""Reading a LoRA's tensor names: which layer, which factor, whatever tool wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from ..errors import InputFileError, some_of
from .layer_names import LayerNames
from .prefixes import TEXT_ENCODER


class Factor(Enum):
    """DOWN is LoRA_A [rank, in_features], UP is LoRA_B [out_features, rank]. BESIDE: DoRA magnitudes, biases, mids."""

    DOWN = "down"
    UP = "up"
    ALPHA = "alpha"
    BESIDE = "beside"


_FACTORS = tuple(
    (re.compile(pattern + "$"), factor)
    for pattern, factor in (
        (
            r"\.(dora_scale|lora_mid\.weight|lora_magnitude_vector(\.[^.]+)?(\.weight)?|lora_[AB](\.[^.]+)?\.bias"
            r"|reshape_weight)",
            Factor.BESIDE,
        ),
        (r"\.lora_down(\.weight)?", Factor.DOWN),
        (r"\.lora_up(\.weight)?", Factor.UP),
        (r"\.lora_A(\.[^.]+)??(\.weight)?", Factor.DOWN),  # peft puts the adapter's name between
        (r"\.lora_B(\.[^.]+)??(\.weight)?", Factor.UP),
        (r"\.lora_linear_layer\.down\.weight", Factor.DOWN),
        (r"\.lora_linear_layer\.up\.weight", Factor.UP),
        (r"[._]lora\.down\.weight", Factor.DOWN),
        (r"[._]lora\.up\.weight", Factor.UP),
        (r"(\.lora)?\.alpha", Factor.ALPHA),
    )
)
# Other ways to store a change of weights: none of them has rows that are input directions.
_OTHER_KINDS = tuple(
    (re.compile(pattern + "$"), kind)
    for pattern, kind in (
        (r"\.hada_(w[12]_[ab]|t[12])", "LoHa"),
        (r"\.lokr_(w[12](_[ab])?|t2)", "LoKr"),
        (r"\.(a1|a2|b1|b2|bm)\.weight", "GLoRA"),
        (r"\.(oft_blocks|oft_diag|oft_[rR](\.[^.]+)?(\.weight)?|boft_[rRs])", "OFT"),
        (r"\.on_input", "IA3"),
        (r"\.(diff|diff_b|set_weight|w_norm|b_norm)", "full difference"),
    )
)


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
    for pattern, factor in _FACTORS:
        match = pattern.search(name)
        if match and match.start():
            # diffusers' old attention processors: attn1.processor.to_q_lora.down.weight
            return LoraKey(name[: match.start()].replace(".processor.", "."), factor)
    return next((kind for pattern, kind in _OTHER_KINDS if pattern.search(name)), None)


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
