"""Every form that this pack reads -> the comfy_quant form that it writes. Nothing is requantized."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.metadata import Config
from ..checkpoint.source import Source
from ..errors import InputFileError, PlanError, Problem, RequestError, counted, some_of
from ..names.diffusers import diffusers_warning
from ..stored.canonical import canonical_config
from ..stored.foreign import refusal
from ..stored.form import Form
from ..stored.layers import StoredLayer, stored_layers
from ..stored.legacy import CODED, LEGACY_NAMES, is_marker, marker_size
from .canonicalize import InputScale, canonicalize
from .configs import HeaderMode, write_configs
from .rewrite import Draft, Rewrite


@dataclass(frozen=True, slots=True)
class MigrateOptions:
    """hp_filter: a regex; the layers it finds must be in high precision.

    full_precision_matrix_mult: sets it in, or removes it from, every FP8 layer. None keeps it, and takes it from a
    legacy marker of two elements, as ComfyUI does. header: also write the header's copy. scale_name: how the names of
    scales end that have another program's name and are not certain; they multiply the codes.
    """

    hp_filter: str | None = None
    full_precision_matrix_mult: bool | None = None
    input_scale: InputScale = InputScale.KEEP
    header: bool = True
    scale_name: str | None = None


def migrate(src: Source, options: MigrateOptions = MigrateOptions()) -> Rewrite:
    """The same model with every quantized layer in the form that this pack writes; applied twice it changes nothing.

    Raises PlanError (a layer of hp_filter is quantized, or it finds none), InputFileError (a layer cannot be
    decoded; a family of files that this pack does not read), RequestError (no scale is called scale_name).
    """
    stored = stored_layers(src, options.scale_name)
    foreign = refusal(src)
    if foreign and not stored:
        raise InputFileError(foreign)
    check_hp_filter(src, stored, options.hp_filter)
    draft = Draft(src)
    full_precision = options.full_precision_matrix_mult
    from_marker = True if full_precision is None and marker_size(src) == 2 else full_precision
    configs: dict[str, Config] = {}
    for layer, entry in stored.items():
        configs[layer] = canonical_config(
            entry, from_marker if entry.form is Form.LEGACY else full_precision, complete=True
        )
        canonicalize(draft, entry, options.input_scale)
    write_configs(draft, configs, HeaderMode.BUILD if options.header and configs else HeaderMode.KEEP)
    drop_dummies(draft, stored)
    older = Counter((e.form, e.format.name) for e in stored.values() if e.form is not Form.COMFY_QUANT)
    draft.notes += [f"{counted(n, 'layer')}: {form.value} {name} -> comfy_quant" for (form, name), n in older.items()]
    foreign_names = diffusers_warning(src.tensors) if stored else None
    draft.notes += [foreign_names] if foreign_names else []
    return draft.finish()


def check_hp_filter(src: Source, stored: Mapping[str, StoredLayer], pattern: str | None) -> None:
    """PlanError: a layer that must be in high precision is quantized; the pattern is not a regex or finds no
    weight.
    """
    if pattern is None:
        return
    matches = compile_pattern("hp_filter", pattern)
    found = [name.removesuffix(".weight") for name in src.tensors if name.endswith(".weight") and matches.search(name)]
    if not found:
        raise PlanError([Problem(f"{pattern!r} finds no weight in {src.path}. Correct the pattern.", "hp_filter")])
    problems = [
        Problem(
            f"{pattern}: {layer} must be in high precision and is "
            f"{stored[layer].format.name if layer in stored else src.tensors[f'{layer}.weight'].dtype}. Take a file "
            "in which it is not quantized.",
            "hp_filter",
        )
        for layer in found
        if layer in stored or src.tensors[f"{layer}.weight"].dtype in CODED
    ]
    if problems:
        raise PlanError(problems)


def compile_pattern(setting: str, pattern: str) -> re.Pattern[str]:
    """RequestError, about the setting, for what is not a regular expression."""
    try:
        return re.compile(pattern)
    except re.error as err:
        raise RequestError(f"{pattern!r} is not a regular expression: {err}. Escape dots as \\.", setting) from err


def drop_dummies(draft: Draft, stored: Mapping[str, StoredLayer]) -> None:
    """Remove the legacy markers, and legacy scales beside weights that are not quantized."""
    src, odd = draft.src, []
    for name in draft:
        layer, _, last = name.rpartition(".")
        if is_marker(name):
            draft.drop(name)
        elif last in LEGACY_NAMES and layer not in stored:
            if (
                last == "scale_weight"
                and src.tensors[name].dtype in ("F32", "BF16", "F16")
                and bool((src.read(name) != 1).any())
            ):
                odd.append(name)
            draft.drop(name)
    if odd:
        draft.notes.append(
            f"{counted(len(odd), 'scale')} beside weights in high precision: not 1, and left out, as such weights "
            f"are whole: {some_of(odd)}."
        )
