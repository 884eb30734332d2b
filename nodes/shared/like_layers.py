"""Layers that differ in their block numbers only, as one row of a table."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def like_layers(name: str) -> str:
    """The name with N in place of block numbers: layers that differ in these only have the same."""
    return _NUMBER.sub("N", name)
