"""`quantpress inspect`: what a file is, from its header, its metadata and its scales; no weight is read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...quant_core.errors import InputFileError, counted
from ..shared.console import print_json, size_text, table_lines
from ..shared.groups import collapse

if TYPE_CHECKING:
    from ...quant_core.checkpoint.source import Source
    from ...quant_core.stored.layers import StoredLayer


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show what a file holds",
        description="Show a model's layers by format, its recipe, and problems in its metadata. "
        "Reads the header, the metadata and the scales only.",
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--json", action="store_true", help="print it as JSON (see docs/json.md)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    content = summarize(args.file)
    if args.json:
        print_json(content)
    else:
        print("\n".join(_lines(content)))
    return 0


def summarize(path: Path) -> dict[str, Any]:
    """The object that --json prints; docs/json.md describes it. Raises InputFileError: no safetensors file."""
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.pipeline.verify import check_file
    from ...quant_core.stored.foreign import refusal
    from ...quant_core.stored.layers import stored_layers

    findings = [finding.to_json() for finding in check_file(path).findings]
    with open_source(path) as src:
        problems = {}
        try:
            stored = stored_layers(src)
        except InputFileError as err:  # a damaged description: the tensors are listed as they lie in the file
            stored, problems = {}, {"undecodable": str(err)}
        foreign = refusal(src)
        if foreign is not None:
            problems["foreign"] = foreign
        told = {f"{src.path}: {finding['message']}" for finding in findings}
        findings += [
            {"code": code, "severity": "error", "layer": "", "message": message}
            for code, message in problems.items()
            if message not in told
        ]
        taken = {name for layer in stored.values() for name in layer.names.values()}
        rest = [info for info in src.tensors.values() if info.name not in taken]
        return {
            "path": str(src.path),
            "files": [file.name for file in src.files],
            "bytes": src.nbytes,
            "tensors": len(src.tensors),
            "quantized_layers": len(stored),
            "groups": _groups(src, stored),
            "other": _by_dtype([i for i in rest if not _is_linear(i)]),
            "recipe": _recipe(src),
            "metadata_keys": sorted(src.metadata),
            "findings": findings,
        }


def _is_linear(info: Any) -> bool:
    return info.name.endswith(".weight") and len(info.shape) == 2


def _groups(src: Source, stored: dict[str, StoredLayer]) -> list[dict[str, Any]]:
    """Like layers as one row, in file order; quantized layers, and the 2-D weights that are not."""
    alike: dict[tuple[str, tuple[int, ...], int], list[str]] = {}
    for name, info in src.tensors.items():
        layer = name.removesuffix(".weight")
        if layer != name and layer in stored:
            count = sum(src.tensors[part].nbytes for part in stored[layer].names.values())
            alike.setdefault((stored[layer].format.name, stored[layer].shape, count), []).append(layer)
        elif _is_linear(info):
            alike.setdefault((info.dtype, info.shape, info.nbytes), []).append(layer)
    return [
        {"layers": pattern, "count": count, "shape": list(shape), "format": fmt, "bytes": count * nbytes}
        for (fmt, shape, nbytes), layers in alike.items()
        for pattern, count in collapse(layers)
    ]


def _by_dtype(infos: list[Any]) -> list[dict[str, Any]]:
    totals: dict[str, list[int]] = {}
    for info in infos:
        total = totals.setdefault(info.dtype, [0, 0])
        total[0] += 1
        total[1] += info.nbytes
    return [{"dtype": dtype, "count": count, "bytes": nbytes} for dtype, (count, nbytes) in totals.items()]


def _recipe(src: Source) -> dict[str, Any] | None:
    """What QuantPress recorded when it wrote the file; None for files of other tools, and where it cannot be read."""
    from ...quant_core.pipeline.plan import RECIPE_KEY

    try:
        recorded = json.loads(src.metadata.get(RECIPE_KEY, "null"))
    except ValueError:
        return None
    return recorded if isinstance(recorded, dict) else None


def _lines(content: dict[str, Any]) -> list[str]:
    shards = f" in {len(content['files'])} files" if len(content["files"]) > 1 else ""
    lines = [
        f"{content['path']}: {size_text(content['bytes'])}, {counted(content['tensors'], 'tensor')}{shards}, "
        f"{counted(content['quantized_layers'], 'quantized layer')}",
        "",
    ]
    rows = [
        (group["layers"], f"{group['count']}x", str(group["shape"]), group["format"], size_text(group["bytes"]))
        for group in content["groups"]
    ]
    lines += table_lines(rows, ("linear layers", "count", "shape", "format", "size"), right=(1, 4))
    if content["other"]:
        others = ", ".join(
            f"{other['count']}x {other['dtype']} {size_text(other['bytes'])}" for other in content["other"]
        )
        lines += [f"other tensors: {others}"]
    lines += ["", f"recipe: {json.dumps(content['recipe']) if content['recipe'] else 'none recorded'}"]
    if content["metadata_keys"]:
        lines += [f"header metadata: {', '.join(content['metadata_keys'])}"]
    return lines + (
        [f"{f['severity']}: {f['message']} [{f['code']}]" for f in content["findings"]]
        or ["metadata: no problems found"]
    )
