"""The ends of file names. Their case does not matter, as in ComfyUI's lists and loaders."""

from __future__ import annotations

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


def has_suffix(name: str, *suffixes: str) -> bool:
    """Whether the name ends in one of these, which are in small letters."""
    return name.lower().endswith(suffixes)


def without_suffix(name: str, *suffixes: str) -> str:
    """The name without the first of these that it ends in."""
    found = next((suffix for suffix in suffixes if has_suffix(name, suffix)), "")
    return name[: len(name) - len(found)]
