"""`quantpress formats`: the table of all formats, derived from the registry."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..shared.console import print_json, table_lines

if TYPE_CHECKING:
    from ...quant_core.formats.base import Format

# A weight that every format can take; scales of whole tensors and rows hardly show in it.
_EXAMPLE_SHAPE = (4096, 4096)
_GPUS = {(7, 5): "RTX 20", (8, 0): "RTX 30, A100", (8, 9): "RTX 40, H100", (9, 0): "H100", (10, 0): "RTX 50, B200"}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "formats", help="list the formats", description="List the formats and what runs them."
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON (see docs/json.md)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ...quant_core.formats import all_formats

    rows = [describe(fmt) for fmt in all_formats()]
    if args.json:
        print_json({"formats": rows})
        return 0
    header = ("name", "on disk", "bits", "group", "runs in", "fast from", "max error", "source")
    print("\n".join(table_lines([_cells(row) for row in rows], header, right=(2, 6))))
    print(
        f"\nbits: per weight, scales included, of a {_EXAMPLE_SHAPE[0]}x{_EXAMPLE_SHAPE[1]} layer. "
        "max error: of a weight, as a fraction of\nthe largest in its group. "
        "fast from: where the matrix product itself runs in the format; elsewhere the\nweight is decoded first. "
        "A group marked * is the default."
    )
    return 0


def describe(fmt: Format) -> dict[str, Any]:
    """One format as JSON; docs/json.md describes the fields."""
    runtime = fmt.runtime
    return {
        "name": fmt.name,
        "on_disk": fmt.on_disk,
        "title": fmt.title,
        "bits_per_weight": round(fmt.bits_per_weight(_EXAMPLE_SHAPE), 4),
        "group_size": fmt.group_size,
        "group_sizes": list(fmt.group_sizes),
        "rotation": fmt.rotation,
        "rotations": list(fmt.rotations),
        "native_since": runtime.native_since,
        "quantizes_input": runtime.quantizes_input,
        "min_capability": list(runtime.min_capability) if runtime.min_capability else None,
        "error_bound": fmt.error_bound,
        "source": fmt.source,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    sizes = row["group_sizes"] or ([row["group_size"]] if row["group_size"] else [])
    groups = " ".join(f"{size}*" if size == row["group_size"] and len(sizes) > 1 else str(size) for size in sizes)
    runs_in = f"ComfyUI {row['native_since']}" if row["native_since"] else "this pack"
    capability = tuple(row["min_capability"] or ())
    fast = _GPUS.get(capability, f"CUDA {'.'.join(map(str, capability))}") if capability else "-"
    return (
        row["name"],
        row["on_disk"],
        f"{row['bits_per_weight']:.2f}",
        groups or "-",
        runs_in,
        fast,
        f"{row['error_bound']:.2%}",
        row["source"],
    )
