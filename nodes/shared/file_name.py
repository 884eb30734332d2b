"""The name under which a model is saved: the pattern that the user typed, with its tokens replaced."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...quant_core.checkpoint.header import load_json_object
from ...quant_core.checkpoint.metadata import CONFIG_SUFFIX
from ...quant_core.checkpoint.source import Source, open_source
from ...quant_core.checkpoint.suffixes import SUFFIX, has_suffix
from ...quant_core.errors import InputFileError, RequestError
from ...quant_core.pipeline.plan import RECIPE_KEY
from ...quant_core.stored.layers import stored_layers
from .handles import QuantizedHandle, SourceHandle

UNKNOWN = "unknown"
DEFAULT_PATTERN = "{model}-{format}"
_TOKEN = re.compile(r"\{(\w*)\}")


def expand(pattern: str, handle: SourceHandle | QuantizedHandle) -> str:
    """The pattern with its tokens replaced. RequestError for one that is not known."""
    if not _TOKEN.search(pattern):
        return pattern
    values = tokens(handle)

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise RequestError(
                f"{match[0]} is not a token. Known tokens: {', '.join(f'{{{name}}}' for name in values)}."
            )
        return values[match[1]]

    return _TOKEN.sub(value, pattern)


def listed_name(name: str) -> str:
    """A name that the user typed, as the loaders list the file that `write_target` makes of it."""
    text = name.replace("\\", "/").strip()
    return text if has_suffix(text, SUFFIX) else text + SUFFIX


def tokens(handle: SourceHandle | QuantizedHandle) -> dict[str, str]:
    """From the file: its layers, and the recipe in its header.

    What a file of another tool does not tell is "unknown".
    """
    with open_source(handle.path) as src:
        try:
            layers = stored_layers(src)
        except InputFileError:  # a damaged file, saved under a name of its own all the same
            layers = {}
        recipe, formats = recorded_recipe(src), Counter(layer.format.name for layer in layers.values())
        names = {
            name for layer in layers.values() for name in (*layer.names.values(), f"{layer.layer}{CONFIG_SUFFIX}")
        }
        size = sum(src.tensors[name].nbytes for name in names if name in src.tensors)
    weights, now = sum(layer.shape[0] * layer.shape[1] for layer in layers.values()), time.localtime()
    values = {name: str(recipe.get(name, UNKNOWN)) for name in ("format", "group_size", "rounding", "seed")}
    if "format" not in recipe:
        values["format"] = formats.most_common(1)[0][0] if formats else UNKNOWN
    elif recipe.get("group_size") is None:
        values["group_size"] = "whole"
    return {
        "model": handle.label,
        **values,
        "bits": f"{size * 8 / weights:.1f}" if weights else UNKNOWN,
        "date": time.strftime("%Y-%m-%d", now),
        "time": time.strftime("%H%M%S", now),
    }


def recorded_recipe(src: Source) -> Mapping[str, Any]:
    """The recipe that Quantize Model or the command line left in the header; {} in files of other tools."""
    try:
        record = load_json_object(src.metadata.get(RECIPE_KEY, "{}").encode("utf-8", "replace"), RECIPE_KEY)
    except InputFileError:
        return {}
    recipe = record.get("recipe")
    return recipe if isinstance(recipe, dict) else {}
