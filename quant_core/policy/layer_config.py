"""A JSON file that gives single layers their own format: regex -> settings, the most specific pattern wins.

{"_default": {"format": "float8_e4m3fn"},
 "attn": {"format": "int8_rowwise", "full_precision_matrix_mult": true},
 "\\\\.0\\\\.img_mod": {"skip": true}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..algorithms.choosers.absmax import Absmax
from ..algorithms.rounders.nearest import Nearest
from ..checkpoint.header import load_json_object
from ..errors import InputFileError, PlanError, RequestError
from ..formats import all_formats, get_format
from ..formats.base import Format
from .general import Rule
from .recipe import Recipe

_DEFAULT = "_default"
_SETTINGS = (
    "format",
    "skip",
    "block_size",
    "group_size",
    "scaling_mode",
    "simple",
    "full_precision_matrix_mult",
    "scales",
    "rounding",
)
_MODES = ("tensor", "row", "block", "block2d", "block3d")
_LONG_NAME = 8  # literal characters that make a pattern with a digit name a place rather than a kind

# (kind, scaling mode) -> our format; block2d is an old word for block.
FORMAT_OF_MODE = {
    ("fp8", "tensor"): "float8_e4m3fn",
    ("fp8", "row"): "float8_e4m3fn_rowwise",
    ("fp8", "block"): "float8_e4m3fn_blockwise",
    ("fp8", "block3d"): "float8_e4m3fn_block3d",
    ("int8", "tensor"): "int8_tensorwise",
    ("int8", "row"): "int8_rowwise",
    ("int8", "block"): "int8_blockwise",
    ("int8", "block3d"): "int8_lodewise",
}
_KINDS = {"float8_e4m3fn": "fp8", "fp8": "fp8", "int8": "int8", "int8_tensorwise": "int8"}
_SHORT = {"nf4": "bnb_nf4", "fp4": "bnb_fp4", "af4": "bnb_af4", "hybrid_mxfp8": "mxfp8"}


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """rules: the most specific first. default: the recipe for all other layers, None without _default."""

    rules: tuple[Rule, ...]
    default: Recipe | None


def format_for(name: str, mode: str | None = None, block_size: int | None = None) -> Format:
    """A format by our name, or by the older words: fp8 or int8 with a scaling mode. Raises RequestError."""
    if mode is not None and mode not in _MODES:
        raise RequestError(f"there is no scaling mode {mode!r}. Choose one of {', '.join(_MODES)}.")
    name = _SHORT.get(name, name)
    kind = _KINDS.get(name)
    if kind is not None:
        name = FORMAT_OF_MODE[kind, "block" if mode == "block2d" else mode or "tensor"]
    fmt = get_format(name)
    return fmt.with_options(group_size=block_size) if block_size is not None and fmt.group_sizes else fmt


def load_layer_config(path: str | Path, base: Recipe) -> LayerConfig:
    """The file's text, as `parse_layer_config`. InputFileError also where it cannot be read."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise InputFileError(f"{path}: the file cannot be read: {err.strerror or err}. Check the path.") from err
    return parse_layer_config(raw, path.name, base)


def parse_layer_config(raw: bytes, where: str, base: Recipe) -> LayerConfig:
    """raw: JSON. where: named in errors. base: what the recipes begin as.

    Raises InputFileError (no JSON), PlanError (every bad entry, by its pattern).
    """
    content = load_json_object(raw, where, "Correct it there; `quantpress template` writes a file to begin with.")
    problems: list[str] = []
    found: dict[str, Rule] = {}
    for pattern, settings in content.items():
        if pattern.startswith("_") and pattern != _DEFAULT:
            continue
        try:
            found[pattern] = _rule(pattern, settings, base)
        except RequestError as err:
            problems.append(f"{where}: {pattern!r}: {err}")
    if problems:
        raise PlanError(problems)
    default = found.pop(_DEFAULT, None)
    ordered = sorted(found.values(), key=lambda rule: specificity(rule.pattern), reverse=True)
    return LayerConfig(tuple(ordered), default.recipe if default else None)


def specificity(pattern: str) -> tuple[bool, int]:
    """How closely a regex names a place: first whether it has a number and many literal characters, then how many."""
    literal = re.sub(r"\\[dDwWsSbBAZ]|(?<!\\)[\^$.*+?{}()\[\]|]", "", pattern).replace("\\", "")
    return bool(re.search(r"\d", pattern)) and len(literal) >= _LONG_NAME, len(literal)


def _rule(pattern: str, settings: Any, base: Recipe) -> Rule:
    if not isinstance(settings, dict):
        raise RequestError(f"found {json.dumps(settings)}, needs an object of settings.")
    strangers = [key for key in settings if key not in _SETTINGS and not key.startswith("_")]
    if strangers:
        raise RequestError(f"there is no setting {strangers[0]!r}. Known settings: {', '.join(_SETTINGS)}.")
    try:
        re.compile(pattern)
    except re.error as err:
        raise RequestError(f"this is not a regular expression: {err}. Escape dots as \\\\. in JSON.") from err
    if settings.get("skip") is True:
        return Rule(pattern, None)
    name = settings.get("format")
    if not isinstance(name, str) or not name:
        raise RequestError(
            f"`format` is {json.dumps(name)}; name one of {', '.join(fmt.name for fmt in all_formats())}, or set "
            '"skip": true.'
        )
    fmt = format_for(
        name,
        _typed(settings, "scaling_mode", str),
        _typed(settings, "block_size", int) or _typed(settings, "group_size", int),
    )
    scales = _typed(settings, "scales", str) or base.scales.name
    rounding = _typed(settings, "rounding", str) or base.rounding.name
    if settings.get("simple") is True:
        scales, rounding = Absmax.name, Nearest.name
    recipe = replace(base, format=fmt).with_methods(scales, rounding)
    full = settings.get("full_precision_matrix_mult") is True
    return Rule(pattern, recipe, {"full_precision_matrix_mult": True} if full else {})


def _typed(settings: Mapping[str, Any], key: str, kind: type) -> Any:
    value = settings.get(key)
    if value is not None and type(value) is not kind:
        raise RequestError(f"`{key}` is {json.dumps(value)}; a {'number' if kind is int else 'text'} is needed.")
    return value


def template(layers: Mapping[str, tuple[int, ...]]) -> str:
    """JSON text to be filled in: every linear layer with an empty format, which is refused until it is filled."""
    entries = {f"^{re.escape(layer)}$": {"format": "", "_shape": list(shape)} for layer, shape in layers.items()}
    return json.dumps({_DEFAULT: {"format": "float8_e4m3fn"}, **entries}, indent=2, ensure_ascii=False) + "\n"
