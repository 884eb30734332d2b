"""`quantpress verify`: does a loader read this file, and how far is it from its source?"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...quant_core.errors import counted
from ..shared.console import print_json, table_lines
from ..shared.groups import collapse_sentences
from ..shared.interrupt import stop_on_signal
from ..shared.progress import show_progress

if TYPE_CHECKING:
    from ...quant_core.pipeline.verify import LayerCheck, VerifyReport

_WORST_SHOWN = 5
_FINDINGS_SHOWN = 30


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "verify",
        help="check a quantized file",
        description="Check a file by the rules of the loaders that will read it, and with --against "
        "compare every layer with the file it was made from. Exit code 1 on errors.",
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--against", metavar="SOURCE", type=Path, help="the file it was made from")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON (see docs/json.md)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ...quant_core.cancel import cancel_scope
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.pipeline.compare import verify_file
    from ...quant_core.tools.contents import require_model

    if args.against is not None:
        with open_source(args.against) as source:
            require_model(source)
    with stop_on_signal() as cancel, cancel_scope(cancel), show_progress("verifying") as progress:
        report = verify_file(args.file, args.against, progress=progress)
    if args.json:
        print_json(report.to_json())
    else:
        _print_report(report)
    if report.errors:
        print(f"quantpress: error: {args.file}: {counted(len(report.errors), 'error')} found", file=sys.stderr)
        return 1
    return 0


def _print_report(report: VerifyReport) -> None:
    texts = collapse_sentences(
        f"{finding.severity}: {finding.message} [{finding.code}]" for finding in report.findings
    )
    for text in texts[:_FINDINGS_SHOWN]:
        print(text)
    if len(texts) > _FINDINGS_SHOWN:
        print(f"and {len(texts) - _FINDINGS_SHOWN} more lines like these (--json lists every finding)")
    verdict = "not ok" if report.errors else "ok"
    print(
        f"{report.path}: {verdict}, {counted(len(report.layers), 'quantized layer')}, "
        f"{counted(len(report.errors), 'error')}, "
        f"{counted(len(report.findings) - len(report.errors), 'warning')}"
    )
    if not report.layers:
        print("  nothing in it is described as quantized, so there was nothing to check but that the file can be read")
    formats = list(dict.fromkeys(layer.format for layer in report.layers))
    rows = [_format_cells(name, [layer for layer in report.layers if layer.format == name]) for name in formats]
    if rows:
        print("\n".join(table_lines(rows, ("format", "layers", "error", "SNR"), right=(1, 2, 3), indent="  ")))
    measured = [layer for layer in report.layers if layer.relative_error is not None]
    if measured:
        worst = sorted(measured, key=_badness, reverse=True)[:_WORST_SHOWN]
        cells = [
            (layer.layer, layer.format, f"{layer.relative_error:.4f}", f"{layer.snr_db:.1f} dB") for layer in worst
        ]
        print("\n".join(table_lines(cells, ("worst layers", "format", "error", "SNR"), right=(2, 3), indent="  ")))


def _badness(layer: LayerCheck) -> float:
    error = layer.relative_error
    return math.inf if error is None or math.isnan(error) else error


def _format_cells(name: str, layers: list[LayerCheck]) -> tuple[str, ...]:
    """Error and SNR over all weights of the layers together, as the report of a conversion counts them."""
    from ...quant_core.numerics.metrics import snr_db

    measured = [(layer.relative_error, math.prod(layer.shape)) for layer in layers if layer.relative_error is not None]
    if not measured:
        return name, str(len(layers)), "-", "-"
    error = math.sqrt(sum(e * e * size for e, size in measured) / sum(size for _, size in measured))
    return name, str(len(layers)), f"{error:.4f}", f"{snr_db(error):.1f} dB"
