"""What is inside a file: layer groups, formats, sizes, and what the loaders would complain about."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ...quant_core.checkpoint.source import open_source
from ...quant_core.errors import InputFileError, counted
from ...quant_core.pipeline.plan import RECIPE_KEY
from ...quant_core.pipeline.verify import check_file
from ...quant_core.stored.layers import stored_layers
from ...quant_core.stored.suffixes import QUANT_SUFFIXES
from ..shared.detection import detect
from ..shared.like_layers import like_layers

_MAX_ROWS = 30  # of a section
_WIDTH = 60  # characters of a row that a node 400 wide shows beside its scroll bar
_MIN_NAME, _MIN_PART = 20, 4


def inspect(path: Path) -> dict[str, Any]:
    """JSON: architecture, sizes, groups of equal layers, recipe, findings. Reads the header and the scales."""
    findings = [finding.to_json() for finding in check_file(path).findings]
    with open_source(path) as source:
        groups = _groups(source)
        return {
            "file": path.name,
            "architecture": detect(path).model,
            "bytes": source.nbytes,
            "tensors": len(source.tensors),
            "groups": groups,
            "recipe": _recipe(source.metadata.get(RECIPE_KEY)),
            "findings": findings,
        }


def _groups(source: Any) -> list[dict[str, Any]]:
    """Tensors whose names differ in block numbers only, with the same format and shape, as one row."""
    try:
        stored = stored_layers(source)
    except InputFileError:  # what is wrong with it is among the findings
        stored = {}
    rows: dict[tuple[str, str, tuple[int, ...]], list[int]] = defaultdict(lambda: [0, 0])
    for name, info in source.tensors.items():
        layer, _, suffix = name.rpartition(".")
        quantized = stored.get(layer)
        if quantized is not None and suffix in QUANT_SUFFIXES:
            key = (like_layers(layer), quantized.format.name, tuple(quantized.shape))
            rows[key][0] += suffix == "weight"
        else:
            key = (like_layers(name), info.dtype, tuple(info.shape))
            rows[key][0] += 1
        rows[key][1] += info.nbytes
    found = [
        {"layers": name, "format": kind, "shape": list(shape), "count": count, "bytes": size}
        for (name, kind, shape), (count, size) in rows.items()
    ]
    return sorted(found, key=lambda row: -row["bytes"])


def _recipe(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def table(found: dict[str, Any]) -> str:
    """The same for people: a section per format, largest first. Rows fit a node of the frontend's usual width."""
    lines = [
        f"{found['file']}: {found['architecture'] or 'unknown model'}, {found['bytes'] / 1e9:.3f} GB, "
        f"{counted(found['tensors'], 'tensor')}"
    ]
    recipe = found["recipe"]
    if isinstance(recipe, dict) and isinstance(recipe.get("recipe"), dict):
        lines.append("made with: " + ", ".join(f"{key} {value}" for key, value in recipe["recipe"].items()))
    problems = found["findings"]
    lines.append("no problems found" if not problems else f"{counted(len(problems), 'problem')}:")
    lines += [f"  {problem['severity']}: {problem['message']}" for problem in problems[:8]]
    lines += [f"  and {counted(len(problems) - 8, 'more problem')} (all in the JSON)"] if len(problems) > 8 else []
    sections: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in found["groups"]:
        sections[row["format"]].append(row)
    # Quantized layers first: formats have small letters, the dtypes of the rest capitals.
    for kind, rows in sorted(sections.items(), key=lambda section: section[0].isupper()):
        size = sum(row["bytes"] for row in rows)
        lines += [f"{kind}: {size / 1e6:.2f} MB, {size / max(1, found['bytes']):.0%} of the file", *_rows(rows)]
    return "\n".join(lines)


def _rows(groups: list[dict[str, Any]]) -> list[str]:
    """Matrices and convolutions; biases, norms and scalars, which are many and small, in one line together."""
    small = [row for row in groups if len(row["shape"]) < 2]
    groups, left = [row for row in groups if row not in small][:_MAX_ROWS], len(groups) - len(small) - _MAX_ROWS
    rest = [f" and {counted(left, 'smaller group')} (all in the JSON)"] if left > 0 else []
    if small:
        rest.append(
            f" {counted(sum(row['count'] for row in small), 'bias, norm or number', 'biases, norms and numbers')}, "
            f"{sum(row['bytes'] for row in small) / 1e6:.2f} MB"
        )
    if not groups:
        return rest
    cells = [
        (f"{row['count']}x", "x".join(map(str, row["shape"])) or "scalar", f"{row['bytes'] / 1e6:.2f} MB")
        for row in groups
    ]
    count, shape, size = (max(map(len, column)) for column in zip(*cells, strict=True))
    limit = max(_MIN_NAME, _WIDTH - count - shape - size - 4)
    names = [shortened(row["layers"].removesuffix(".weight"), limit) for row in groups]
    width = max(map(len, names))
    return [
        *(
            f" {name:<{width}} {many:>{count}} {form:<{shape}} {mb:>{size}}"
            for name, (many, form, mb) in zip(names, cells, strict=True)
        ),
        *rest,
    ]


def shortened(name: str, limit: int) -> str:
    """The name in at most `limit` characters where that can be. Its longest dotted parts are cut and end in ~."""
    parts = name.split(".")
    keep = [len(part) for part in parts]
    while sum(keep) + len(keep) - 1 > limit and max(keep) > _MIN_PART:
        keep[keep.index(max(keep))] -= 1
    return ".".join(
        part if length == len(part) else part[: length - 1] + "~" for part, length in zip(parts, keep, strict=True)
    )
