"""What is inside a file: layer groups, formats, sizes, and what the loaders would complain about."""
from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..quant_core.checkpoint.layers import QUANT_SUFFIXES, stored_layers
from ..quant_core.checkpoint.source import open_source
from ..quant_core.errors import InputFileError
from ..quant_core.plan import RECIPE_KEY
from ..quant_core.verify import check_file
from ._detection import detect

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_MAX_ROWS = 40


def like_layers(name: str) -> str:
    """The name with N in place of block numbers: layers that differ in these only have the same."""
    return _NUMBER.sub("N", name)


def inspect(path: Path) -> dict[str, Any]:
    """JSON: architecture, sizes, groups of equal layers, recipe, findings. Reads the header and the scales."""
    findings = [finding.to_json() for finding in check_file(path).findings]
    with open_source(path) as source:
        groups = _groups(source)
        return {"file": path.name, "architecture": detect(path).model, "bytes": source.nbytes, "tensors": len(source.tensors),
                "groups": groups, "recipe": _recipe(source.metadata.get(RECIPE_KEY)), "findings": findings}


def _groups(source: Any) -> list[dict[str, Any]]:
    """Tensors whose names differ in block numbers only, with the same format and shape, as one row."""
    try:
        stored = stored_layers(source)
    except InputFileError:      # what is wrong with it is among the findings
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
    found = [{"layers": name, "format": kind, "shape": list(shape), "count": count, "bytes": size}
             for (name, kind, shape), (count, size) in rows.items()]
    return sorted(found, key=lambda row: -row["bytes"])


def _recipe(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def table(found: dict[str, Any]) -> str:
    """The same for people, largest groups first."""
    total = max(1, found["bytes"])
    formats: dict[str, int] = defaultdict(int)
    for row in found["groups"]:
        formats[row["format"]] += row["bytes"]
    lines = [f"{found['file']}: {found['architecture'] or 'unknown model'}, {found['bytes'] / 1e9:.3f} GB, {found['tensors']} tensors",
             "by format: " + ", ".join(f"{name} {size / total:.0%}" for name, size in sorted(formats.items(), key=lambda f: -f[1]))]
    recipe = found["recipe"]
    if isinstance(recipe, dict) and isinstance(recipe.get("recipe"), dict):
        lines.append("made with: " + ", ".join(f"{key} {value}" for key, value in recipe["recipe"].items()))
    problems = found["findings"]
    lines.append("no problems found" if not problems else f"{len(problems)} problems:")
    lines += [f"  {problem['severity']}: {problem['message']}" for problem in problems[:8]]
    rows = found["groups"][:_MAX_ROWS]
    width = max(len(row["layers"]) for row in rows) if rows else 0
    lines += [f"{row['layers']:<{width}}  {row['count']:>3} x {'x'.join(map(str, row['shape'])) or 'scalar':<12} "
              f"{row['format']:<22} {row['bytes'] / 1e6:9.2f} MB" for row in rows]
    if len(found["groups"]) > _MAX_ROWS:
        lines.append(f"... and {len(found['groups']) - _MAX_ROWS} smaller groups (all in the JSON)")
    return "\n".join(lines)
