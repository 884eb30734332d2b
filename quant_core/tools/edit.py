"""Editing what a file says of its quantized layers: keys added and removed, tensors and header always together."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.header import load_json_object
from ..checkpoint.metadata import Config, encode_config
from ..checkpoint.source import Source
from ..errors import InputFileError, PlanError, Problem, Remedy, RequestError, counted
from ..pipeline.verify import Finding, check_layer
from ..stored.configs import layer_configs
from .configs import HeaderMode, write_configs
from .migrate import compile_pattern
from .rewrite import Draft, Rewrite

_WORDS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class Edit:
    """add: keys set in every chosen layer. remove: keys taken out, where they are. layers: a regex; None is all.

    header: KEEP updates the header's copy where there is one, BUILD writes it for every layer, DROP removes it.
    force: allow what would keep the file from loading.
    """

    add: Mapping[str, Any] = field(default_factory=dict)
    remove: Sequence[str] = ()
    layers: str | None = None
    header: HeaderMode = HeaderMode.KEEP
    force: bool = False


def edit(src: Source, change: Edit) -> Rewrite:
    """The same file with other configs. A layer that the header alone describes gets its tensor, too.

    Raises RequestError (nothing is quantized, no layer is chosen, a bad pattern), PlanError: the changed layer would
    not load any more (no `format`, a group_size that contradicts the scales), unless forced.
    """
    configs = layer_configs(src, lenient=True).layers
    if not configs:
        raise RequestError(
            f"{src.path}: no layer has a comfy_quant description to edit. For legacy files run `quantpress "
            "migrate` first."
        )
    chosen = list(configs)
    if change.layers is not None:
        matches = compile_pattern("layers", change.layers)
        chosen = [layer for layer in configs if matches.search(layer)]
        if not chosen:
            raise RequestError(
                f"{change.layers!r} finds none of the {counted(len(configs), 'quantized layer')}, such as "
                f"{next(iter(configs))!r}. Correct the pattern.",
                "layers",
            )
    edited = {layer: _edited(configs[layer], change) for layer in chosen}
    if not change.force:
        problems = [text for layer in chosen for text in _new_problems(src, layer, configs[layer], edited[layer])]
        if problems:
            raise PlanError(problems)
    draft = Draft(src)
    write_configs(draft, edited, change.header, configs, complete=not change.force)
    return draft.finish()


def _edited(config: Config, change: Edit) -> Config:
    kept = {key: value for key, value in config.items() if key not in change.remove}
    return {**kept, **change.add}


def _new_problems(src: Source, layer: str, before: Config, after: Config) -> list[Problem]:
    """What is wrong with the layer under its new config that was not wrong before."""
    if "format" not in after:
        text = f"{layer}: without `format` no loader knows how to read the layer. Keep the key."
        return [Problem(text, "force", Remedy.FORCE)]
    try:
        encode_config(after)
    except RequestError as err:
        return [Problem(f"{layer}: {err}")]
    old: list[Finding] = []
    new: list[Finding] = []
    check_layer(src, layer, before, old)
    check_layer(src, layer, after, new)
    known = {finding.code for finding in old}
    return [
        Problem(f"{finding.message} The file would not load.", "force", Remedy.FORCE)
        for finding in new
        if finding.code not in known
    ]


def parse_pairs(text: str, setting: str = "add") -> dict[str, Any]:
    """Keys and values as a user types them: a JSON object, or `'key': true, 'other': 128` in Python's or JSON's words.

    Raises RequestError, about the setting: anything but plain values and lists of them.
    """
    wrapped = text.strip() if text.strip().startswith("{") else "{" + text + "}"
    try:
        pairs = load_json_object(wrapped.encode("utf-8"), "the keys to add")
    except InputFileError:  # no JSON; Python's notation, then
        pairs = _python_object(text, wrapped, setting)
    for key, value in pairs.items():
        if isinstance(value, dict):
            raise RequestError(
                f"{text!r}: {key!r} holds an object; its members belong at the root. Give them there.", setting
            )
    return pairs


def _python_object(text: str, wrapped: str, setting: str) -> dict[str, Any]:
    try:
        tree = ast.parse(wrapped, mode="eval").body
        value = _value(tree)
    except (SyntaxError, ValueError, RecursionError) as err:
        raise RequestError(
            f"{text!r} is neither JSON nor a list of 'key': value ({err}). Write it like "
            "\"'full_precision_matrix_mult': true\".",
            setting,
        ) from err
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RequestError(
            f"{text!r}: keys must be quoted text. Write it like \"'full_precision_matrix_mult': true\".", setting
        )
    return value


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool, type(None))):
        return node.value
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
        and isinstance(node.operand.value, (int, float))
        and not isinstance(node.operand.value, bool)
    ):
        return -node.operand.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [key for key in node.keys if key is not None]
        if len(keys) == len(node.keys):  # a None there is a `**mapping`
            return {_value(key): _value(value) for key, value in zip(keys, node.values, strict=True)}
    raise ValueError(f"{ast.unparse(node)} is not a plain value")


def parse_names(text: str) -> tuple[str, ...]:
    """ "a, b" -> ("a", "b"); empty parts are left out."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
