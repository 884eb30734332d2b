"""`quantpress calibration`: what a captured calibration holds, and several of them as one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...quant_core.errors import counted
from ..shared.console import print_json, size_text, table_lines
from ..shared.interrupt import stop_on_signal
from ..shared.progress import show_progress

if TYPE_CHECKING:
    from ...quant_core.calibration.calibration import LayerSummary
    from ...quant_core.calibration.storage import CalibrationReader

_SHOWN = 12


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "calibration",
        help="look into captured calibrations, and merge them",
        description="Calibrations are captured in ComfyUI, by the node Capture Activations.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    inspect = actions.add_parser("inspect", help="runs, model calls, layers, rows and outlier channels")
    inspect.add_argument("file", metavar="FILE", type=Path)
    inspect.add_argument(
        "--all", action="store_true", help="list every layer, not only those with the largest outliers"
    )
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.set_defaults(run=_inspect)
    merge = actions.add_parser("merge", help="several captures of one model as one")
    merge.add_argument("output", metavar="OUT", type=Path)
    merge.add_argument("files", metavar="FILE", type=Path, nargs="+")
    merge.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    merge.set_defaults(run=_merge, parser=merge)


def _inspect(args: argparse.Namespace) -> int:
    from ...quant_core.calibration.calibration import summarise
    from ...quant_core.calibration.storage import open_calibration
    from ...quant_core.cancel import cancel_scope, poll

    rows = []
    with stop_on_signal() as cancel, cancel_scope(cancel), open_calibration(args.file) as reader:
        for layer in reader.layers:
            poll()
            rows.append(summarise(layer, reader.statistics(layer)))
        content = _content(args.file, reader, rows)
    if args.json:
        print_json(content)
        return 0
    _print_runs(args.file, content)
    _print_layers(rows if args.all else sorted(rows, key=lambda row: -row.absmax / max(row.rms, 1e-30))[:_SHOWN])
    return 0


def _print_runs(path: Path, content: dict[str, Any]) -> None:
    print(
        f"{path}: {counted(len(content['layers']), 'layer')} captured in "
        f"{counted(len(content['runs']), 'run')}, {size_text(content['bytes'])}"
    )
    calls = content["calls"]
    if calls["count"]:
        print(f"  {counted(calls['count'], 'model call')} kept whole, {size_text(calls['bytes'])}")
    for number, run in enumerate(content["runs"], 1):
        state = "" if run["completed"] else ", stopped early"
        loras = f", LoRA: {', '.join(run['loras'])}" if run["loras"] else ""
        print(
            f"  run {number}: {counted(run['steps'], 'step')}{state}{', ' + run['note'] if run['note'] else ''}{loras}"
        )


def _print_layers(rows: Sequence[LayerSummary]) -> None:
    cells = [
        (
            row.layer,
            str(row.in_features),
            str(row.sampled),
            f"{row.absmax:.4g}",
            f"{row.p999:.4g}",
            f"{row.rms:.4g}",
            row.hessian,
            " ".join(str(channel) for channel, _, _ in row.channels),
        )
        for row in rows
    ]
    print(
        "\n".join(
            table_lines(
                cells,
                ("layer", "K", "rows", "absmax", "p99.9", "rms", "Hessian", "largest channels"),
                right=(1, 2, 3, 4, 5),
                indent="  ",
            )
        )
    )


def _content(path: Path, reader: CalibrationReader, rows: list[LayerSummary]) -> dict[str, Any]:
    from dataclasses import asdict

    header = reader.header
    runs = [
        {
            "note": run.note,
            "completed": run.completed,
            "steps": len(run.steps),
            "labels": dict(run.labels),
            "loras": list(run.loras),
        }
        for run in header.runs
    ]
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "pack_version": header.pack_version,
        "seed": header.seed,
        "weighting": header.weighting,
        "runs": runs,
        "calls": {"count": reader.call_count, "bytes": header.calls.nbytes},
        "layers": [asdict(row) for row in rows],
    }


def _merge(args: argparse.Namespace) -> int:
    from ...quant_core.calibration.merge import merge_files
    from ...quant_core.cancel import cancel_scope

    if len(args.files) < 2:
        args.parser.error("two calibrations or more are needed")
    with stop_on_signal() as cancel, cancel_scope(cancel), show_progress("merging") as progress:
        merged = merge_files(args.files, args.output, args.overwrite, progress)
    calls = f", {counted(merged.calls, 'model call')}" if merged.calls else ""
    print(
        f"{args.output}: {len(args.files)} calibrations merged, "
        f"{counted(merged.layers, 'layer')}, {counted(merged.runs, 'run')}{calls}"
    )
    return 0
