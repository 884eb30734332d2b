"""Many rows of bench/rounding/synthetic.py to one per format and method.

Each has medians over the layers, the worst layer, and how many layers are above nearest.

    python bench/rounding/summary.py rows.jsonl ... > summary.jsonl      the same as a table on standard error

Before the table come the rows of methods that saw data and still ended above round-to-nearest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any


def summary(rows: list[dict[str, Any]], single: bool = False) -> list[dict[str, Any]]:
    """single: every layer on its own, where there is one per shape. Rows that tell of a failure are left out."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "failed" not in row:
            groups.setdefault((row["layer"] if single else "", row["format"], row["method"]), []).append(row)
    found = []
    for (layer, fmt, method), group in sorted(groups.items(), key=lambda item: item[0][:2]):
        ratios = [row["output_ratio"] or 0.0 for row in group]
        middle = lambda what, group=group: round(statistics.median(row.get(what) or 0.0 for row in group), 5)  # noqa: E731
        about = {key: group[0][key] for key in ("machine", "torch", "commit", "threads") if key in group[0]}
        found.append(
            about
            | ({"layer": layer} if single else {})
            | {
                "format": fmt,
                "method": method,
                "layers": len(group),
                "output_error": middle("output_error"),
                "output_ratio": middle("output_ratio"),
                "worst_ratio": round(max(ratios), 4),
                "worst_layer": group[ratios.index(max(ratios))]["layer"],
                "above_nearest": sum(ratio > 1 for ratio in ratios),
                "fell_back": sum(row.get("fell_back", False) for row in group),
                "weight_ratio": middle("weight_ratio"),
                "seconds": middle("seconds"),
                "weight_copies": middle("peak_weight_copies"),
            }
        )
    return found


def table(rows: list[dict[str, Any]], single: bool = False) -> None:
    for row in rows:
        if (row.get("output_ratio") or 0) > 1 and row.get("data", True) and row["method"] != "search":
            print(
                f"above nearest: {row['output_ratio']:.3f} x of {row['nearest_output_error']:.5f}, {row['method']}, "
                f"{row['format']}, {row['layer']} {row['shape']}",
                file=sys.stderr,
            )
    print(
        f"{'layer':22s} {'format':24s} {'method':16s} {'out':>8s} {'x near':>7s} {'worst':>6s} {'above':>5s} "
        f"{'fell':>4s} {'w x near':>8s} {'s':>8s} {'copies':>6s}",
        file=sys.stderr,
    )
    for row in summary(rows, single):
        print(
            f"{row.get('layer', ''):22s} {row['format']:24s} {row['method']:16s} {row['output_error']:8.4f} "
            f"{row['output_ratio']:7.3f} {row['worst_ratio']:6.3f} {row['above_nearest']:5d} {row['fell_back']:4d} "
            f"{row['weight_ratio']:8.4f} {row['seconds']:8.4f} {row['weight_copies']:6.2f}",
            file=sys.stderr,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    rows = [json.loads(line) for file in args.files for line in file.read_text(encoding="utf-8").splitlines()]
    table(rows)
    for row in summary(rows):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
