"""Options of `quantize` that reach into single layers and algorithms: rules, the layer-config file, settings, keys."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...quant_core.errors import RequestError
from .wording import named_flag

if TYPE_CHECKING:
    from ...quant_core.policy.general import Policy, Rule
    from ...quant_core.policy.recipe import Recipe

KEEP, NEAREST, FULL_PRECISION = "keep", "nearest", "full-precision"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX=FORMAT",
        help="the format of layers whose name matches, or `keep`; the first rule that matches wins over all "
        "other options; may be repeated. FORMAT:64 sets a group size; FORMAT,nearest rounds to nearest; "
        "FORMAT,full-precision sets full_precision_matrix_mult",
    )
    parser.add_argument(
        "--layer-config",
        type=Path,
        metavar="FILE.json",
        help="rules from a file: regex -> settings, the most specific wins (see `quantpress template`)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the rounding or scale method, such as iterations=800; may be repeated",
    )
    parser.add_argument(
        "--add-config",
        action="append",
        default=[],
        metavar="PAIRS",
        help="keys for the metadata of every quantized layer, like \"'full_precision_matrix_mult': true\"",
    )


def apply(args: argparse.Namespace, recipe: Recipe, policy: Policy) -> tuple[Recipe, Policy]:
    """The recipe and policy with the rules and keys of these options. Raises QuantPressError."""
    from ...quant_core.policy.layer_config import load_layer_config
    from ...quant_core.tools.edit import parse_pairs

    rules = tuple(parse_rule(text, recipe) for text in args.rule)
    if args.layer_config is not None:
        loaded = load_layer_config(args.layer_config, recipe)
        rules += loaded.rules
        recipe = loaded.default or recipe
    config: dict[str, Any] = {}
    for text in args.add_config:
        config |= parse_pairs(text, "config")
    return recipe, replace(policy, rules=rules, config=config)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON where it is that, else as text."""
    options = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found or not name:
            raise RequestError(f"--option {pair!r}: write it as NAME=VALUE.")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def parse_rule(text: str, base: Recipe) -> Rule:
    """ "attn=int8_blockwise:64,nearest": the last `=` divides, as a regex may hold others."""
    from ...quant_core.policy.general import Rule
    from ...quant_core.policy.layer_config import format_for

    pattern, found, wish = text.rpartition("=")
    if not found or not pattern or not wish:
        raise RequestError(f"--rule {text!r}: write it as REGEX=FORMAT, or REGEX=keep.")
    target, *flags = wish.split(",")
    if target == KEEP:
        return Rule(pattern, None)
    unknown = [flag for flag in flags if flag not in (NEAREST, FULL_PRECISION)]
    name, _, size = target.partition(":")
    if unknown or (size and not size.isdigit()):
        raise RequestError(
            f"--rule {text!r}: {unknown[0] if unknown else size!r} is not understood. Write FORMAT, FORMAT:GROUP, "
            f"and {NEAREST} or {FULL_PRECISION} behind commas."
        )
    with named_flag(f"--rule {text!r}"):
        recipe = replace(base, format=format_for(name, None, int(size) if size else None))
    if NEAREST in flags:
        recipe = recipe.with_methods("absmax", "nearest")
    return Rule(pattern, recipe, {"full_precision_matrix_mult": True} if FULL_PRECISION in flags else {})
