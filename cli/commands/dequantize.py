"""`quantpress dequantize`: a quantized file back to 16 or 32 bits."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...quant_core.errors import counted
from ..shared.console import duration_text, size_text
from ..shared.interrupt import stop_on_signal
from ..shared.progress import show_progress


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "dequantize",
        help="turn a quantized file back into 16 or 32 bits",
        description="Decode every quantized layer with its own scales into a new file. What rounding lost stays lost.",
    )
    parser.add_argument("input", metavar="INPUT", type=Path)
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the new file, *.safetensors")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="of the decoded weights (default: %(default)s); all other tensors stay as they are",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ...quant_core.tools.dequantize import dequantize

    with stop_on_signal() as cancel, show_progress("decoding") as progress:
        report = dequantize(
            args.input, args.output, args.dtype, overwrite=args.overwrite, progress=progress, cancel=cancel
        )
    formats = ", ".join(f"{count} {name}" for name, count in report.layers.items())
    print(f"{report.target}: {counted(sum(report.layers.values()), 'layer')} decoded to {report.dtype} ({formats})")
    print(f"  size    {size_text(report.source_bytes)} -> {size_text(report.output_bytes)}")
    print(f"  time    {duration_text(report.seconds)}; written and verified")
    return 0
