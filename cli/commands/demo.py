"""`quantpress demo`: a small trained model through every format, as a table and a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..shared.console import size_text

if TYPE_CHECKING:
    from ...demo.results import FormatRow
    from ...demo.run import DemoProgress

_HEADER = ("format", "size", "bits", "weight SNR", "output SNR", "picture PSNR", "quantize", "sample")
_WIDTHS = (26, 8, 5, 10, 10, 12, 8, 6)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="quantize a small trained model to every format and compare",
        description="Quantize the model in assets/ to every format, verify each file, sample the same "
        "seeds with each, and write a contact sheet, a CSV and a JSON file.",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("demo_out"),
        help="where everything goes (default: %(default)s)",
    )
    parser.add_argument("--format", action="append", metavar="NAME", help="only this format; may be repeated")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ...demo.run import run_demo

    print(_line(_HEADER))
    print(_line(["-" * width for width in _WIDTHS]), flush=True)
    result = run_demo(args.out, args.format, progress=_show)
    print(
        f"\noriginal: {size_text(result.original_bytes)}, 16 bits, sampled in {result.original_sample_seconds:.1f} s"
    )
    print(f"sheet: {result.sheet}\ntable: {result.csv}, {result.json}\ntime: {result.seconds:.0f} s")
    return 0


def _show(state: DemoProgress) -> None:
    """Rows on stdout as they are done; on a terminal also what is being done."""
    terminal = sys.stderr.isatty()
    if state.row is not None:
        print(("\r\033[K" if terminal else "") + _line(_cells(state.row)), flush=True)
    elif terminal:
        what = {"original": "sampling the original", "write": "drawing the sheet"}.get(state.stage, state.stage)
        print(
            f"\r\033[K[{state.index}/{state.total}] {state.format or ''} {what} ...",
            end="",
            file=sys.stderr,
            flush=True,
        )
        if state.stage == "write":
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "  ".join(
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
    )


def _cells(row: FormatRow) -> tuple[str, ...]:
    return (
        row.format,
        size_text(row.file_bytes),
        f"{row.bits_per_weight:.2f}",
        f"{row.weight_snr_db:.1f} dB",
        f"{row.output_snr_db:.1f} dB",
        f"{row.picture_psnr_db:.1f} dB",
        f"{row.quantize_seconds:.1f} s",
        f"{row.sample_seconds:.1f} s",
    )
