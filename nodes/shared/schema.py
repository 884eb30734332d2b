"""Calls that older versions of ComfyUI take too: options that they can do without are left out where unknown."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

_OPTIONAL = {"has_intermediate_output", "search_aliases", "metadata", "advanced"}


def known(call: Any, **options: Any) -> dict[str, Any]:
    """The options that `call` has parameters for. Others than _OPTIONAL pass unseen: a typo is still an error."""
    parameters = inspect.signature(call).parameters
    return {name: value for name, value in options.items() if name in parameters or name not in _OPTIONAL}


def schema(**fields: Any) -> io.Schema:
    return io.Schema(**known(io.Schema, **fields))


def rare(kind: Any) -> dict[str, Any]:
    """For widgets that few people need: folded away, where this ComfyUI can do that."""
    return known(kind, advanced=True)
