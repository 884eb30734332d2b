"""What stands before the names of all of a file's tensors: known prefixes, and what no table knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .prefixes import COMFYUI, INNER, known_prefix, prefixes_of, unwrapped

_MORE_THAN = 5  # names, below which ComfyUI does not believe in one of its first three prefixes


def possible_prefixes(names: Iterable[str]) -> list[str]:
    """Every prefix, "" first, that some name can have: known ones in a row."""
    return list(dict.fromkeys(["", *(prefix for name in names for prefix in prefixes_of(name))]))


def shared_prefixes(names: Sequence[str]) -> list[str]:
    """What more than half of the names begin with, up to a dot, and more than half of those, and so on."""
    found: list[str] = []
    here, prefix = list(names), ""
    while here:
        parts = Counter(name[len(prefix) : name.find(".", len(prefix)) + 1] for name in here)
        part, count = parts.most_common(1)[0]
        if not part or 2 * count <= len(here):
            break
        prefix += part
        here = [name for name in here if name.startswith(prefix)]
        found.append(prefix)
    return found


def inner_wrappers(names: Iterable[str]) -> tuple[str, ...]:
    """Those of INNER that stand in the middle of some name."""
    wrapped = [name.removeprefix(known_prefix(name)) for name in names if unwrapped(name) != name]
    return tuple(part for part in INNER if any(f".{part}" in name for name in wrapped))


def prefix_for_comfyui(names: Iterable[str]) -> str:
    """What ComfyUI takes off the names of a diffusion model's tensors; "" where nothing begins with it."""
    listed = list(names)
    *first, last = COMFYUI
    counts = dict.fromkeys(first, 0)
    for name in listed:
        prefix = next((prefix for prefix in first if name.startswith(prefix)), None)
        if prefix is not None:
            counts[prefix] += 1
    top = max(first, key=lambda prefix: counts[prefix])
    chosen = top if counts[top] > _MORE_THAN else last
    return chosen if any(name.startswith(chosen) for name in listed) else ""
