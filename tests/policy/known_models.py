"""Files of every model in the table of architectures: real names, sizes real only in what detection reads."""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from comfyui_quantpress.quant_core.policy.architectures import Architecture

DIMENSIONS = {"linear": 2, "embedding": 2, "gate": 2, "conv": 4, "parameter": 2}
NUMBER = re.compile(r"(?<![^.])(block)?N(?![^.])")


def numbered(pattern: str, depth: int) -> list[str]:
    """Names of the pattern, with 0, 1, ... up to the depth for each N."""
    parts = [
        [NUMBER.sub(lambda m, n=n: f"{m[1] or ''}{n}", part) for n in range(depth)]
        if NUMBER.fullmatch(part)
        else [part]
        for part in pattern.split(".")
    ]
    return [".".join(choice) for choice in itertools.product(*parts)]


def state_of(known: Architecture, depth: int = 2, prefix: str = "", size: int = 8) -> dict[str, tuple[int, ...]]:
    """Names and shapes of such a model. What its detection looks for is there; sizes are real only in that."""
    state: dict[str, tuple[int, ...]] = {}
    for pattern, kind in known.patterns.items():
        for name in numbered(pattern, depth if kind == "linear" else 1):
            state[name] = (size,) * DIMENSIONS[kind]
    signs = [(name, shapes[0]) for name, shapes in known.signs.items()]
    marks = [mark.partition(" ")[::2] for mark in (known.marks[0] if known.marks else ())]
    for name, shape in (*signs, *marks):
        if name.startswith("!"):
            state.pop(name[1:], None)
        else:
            sizes = [int(size) for size in shape.replace("*", str(size)).split("x") if size]
            state[name] = tuple(sizes or state.get(name, (size,)))
    return {prefix + name: shape for name, shape in state.items()}


def zeros(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A BF16 file of these tensors, all zero: as large as they are to read, and hardly anything on the disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path
