"""Layers that differ only in their numbers, as one line: `blocks.{0..11}.attn.qkv`; sentences about them likewise."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The name of a layer or tensor that has a number of its own between dots.
_NUMBERED = re.compile(r"(?<![\w.])\w+(?:\.\w+)*\.\d+(?:\.\w+)*")

# One dotted part of a name: text, or the numbers that stand in its place.
_Part = str | tuple[int, ...]


def collapse(names: Iterable[str]) -> list[tuple[str, int]]:
    """[(pattern, how many names it stands for)], in order of first appearance. Patterns stand for exactly these names.

    Only whole dotted parts are numbers: in `blocks.0.ff.2` two, in `block_0` none.
    """
    patterns: list[tuple[tuple[_Part, ...], int]] = [
        (tuple((int(part),) if _is_number(part) else part for part in name.split(".")), 1) for name in names
    ]
    longest = max((len(parts) for parts, _ in patterns), default=0)
    for position in range(longest):
        patterns = _merge(patterns, position)
    return [(".".join(map(_part_text, parts)), count) for parts, count in patterns]


def collapse_sentences(sentences: Iterable[str]) -> list[str]:
    """Sentences that are equal but for a layer's numbers as one: "blocks.{0..2}.fc1 (3 layers): ...", in order.

    The first numbered name in a sentence counts, with all its repetitions in it.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for sentence in sentences:
        found = _NUMBERED.search(sentence)
        name = found[0] if found else ""
        alike.setdefault(tuple(sentence.split(name)) if name else (sentence,), []).append(name)
    lines = []
    for (first, *rest), names in alike.items():
        for pattern, count in collapse(dict.fromkeys(names)):
            many = f"{pattern} ({count} layers)" if count > 1 else pattern
            lines.append(first + (many + pattern.join(rest) if rest else ""))
    return lines


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and str(int(part)) == part


def _merge(patterns: list[tuple[tuple[_Part, ...], int]], position: int) -> list[tuple[tuple[_Part, ...], int]]:
    """Join the patterns that are equal but for the numbers at this position."""
    merged: dict[tuple, tuple[tuple[_Part, ...], set[int], int]] = {}
    for parts, count in patterns:
        part = parts[position] if position < len(parts) else ""
        if isinstance(part, str):
            merged[("as it is", parts)] = (parts, set(), count)
            continue
        key = ("numbered", parts[:position], parts[position + 1 :])
        _, numbers, before = merged.get(key, (parts, set(), 0))
        merged[key] = (parts, numbers | set(part), before + count)
    return [
        (parts[:position] + (tuple(sorted(numbers)),) + parts[position + 1 :] if numbers else parts, count)
        for parts, numbers, count in merged.values()
    ]


def _part_text(part: _Part) -> str:
    """ "3", "{0..11}", or "{0..3,7}"."""
    if isinstance(part, str):
        return part
    if len(part) == 1:
        return str(part[0])
    runs: list[list[int]] = []
    for number in part:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"
