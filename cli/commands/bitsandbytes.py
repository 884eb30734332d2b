"""`quantpress bitsandbytes` and `quantpress requantize`: other tools' structures, and other formats."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...quant_core.errors import RequestError, counted
from ..shared import rewriting
from ..shared.console import print_json, size_text
from ..shared.interrupt import stop_on_signal
from ..shared.progress import show_progress
from ..shared.wording import named_flag


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bitsandbytes",
        help="write NF4 and FP4 layers as bitsandbytes does, or read them",
        description="export: NF4 and FP4 layers in bitsandbytes' structure, byte for byte as it writes "
        "them. import: the way back.",
        epilog=rewriting.EXIT_CODES,
    )
    parser.add_argument("direction", choices=("export", "import"))
    rewriting.add_arguments(parser)
    parser.add_argument(
        "--nested", action="store_true", help="export: quantize the scales as well (compress_statistics)"
    )
    parser.set_defaults(run=run)
    _add_requantize(commands)


def run(args: argparse.Namespace) -> int:
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.tools.bitsandbytes import export_bitsandbytes
    from ...quant_core.tools.contents import holds_bitsandbytes, nothing_to_import
    from ...quant_core.tools.migrate import migrate

    if args.nested and args.direction == "import":
        args.parser.error("--nested is for export; import reads it from the file")
    with open_source(args.input) as src:
        if args.direction == "import" and not holds_bitsandbytes(src):
            raise RequestError(f"{args.input}: {nothing_to_import(src)} Nothing was written.")
        rewrite = migrate(src) if args.direction == "import" else export_bitsandbytes(src, nested=args.nested)
        return rewriting.finish(
            rewrite,
            args,
            f"{args.direction}ing",
            nothing="its layers are stored in bitsandbytes' way already; use it as it is.",
        )


def _add_requantize(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "requantize",
        help="turn a quantized file into another format",
        description="Decode each quantized layer with its own scales and quantize it again. The error "
        "shown is against the decoded source; quantizing the 16-bit model loses less.",
    )
    parser.add_argument("input", metavar="INPUT", type=Path)
    parser.add_argument("output", metavar="OUTPUT", type=Path)
    parser.add_argument("--format", required=True, metavar="NAME", help="see `quantpress formats`")
    parser.add_argument("--group-size", type=int, metavar="N")
    parser.add_argument(
        "--scales", default="absmax", metavar="NAME", help="how scales are chosen (default: %(default)s)"
    )
    parser.add_argument(
        "--rounding", default="nearest", metavar="NAME", help="how weights are rounded (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    parser.add_argument(
        "--worst", type=int, default=5, metavar="N", help="layers to list, by error (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_requantize)


def _requantize(args: argparse.Namespace) -> int:
    from ...quant_core.formats import get_format
    from ...quant_core.pipeline.request import Request
    from ...quant_core.policy.recipe import parse_recipe
    from ...quant_core.tools.requantize import requantize

    with named_flag("--format"):
        fmt = get_format(args.format)
    fmt = fmt.with_options(args.group_size)
    recipe = parse_recipe(fmt, args.scales, args.rounding)
    request = Request(args.input, args.output, recipe, device=args.device, overwrite=args.overwrite)
    with stop_on_signal() as cancel, show_progress("requantizing") as progress:
        report = requantize(request, progress=progress, cancel=cancel)
    if args.json:
        print_json(report.to_json())
        return 0
    run = report.run
    before = ", ".join(f"{count} {name}" for name, count in report.formats_before.items())
    print(
        f"{run.target}: {before} -> {len(run.quantized)} {args.format}, {size_text(run.source_bytes)} -> "
        f"{size_text(run.output_bytes)}; written and verified"
    )
    print(
        f"  added error  {run.weight_error:.5f} relative to the decoded source; "
        f"{counted(report.lossless_layers, 'layer')} lossless"
    )
    print("\n".join(_worst(run.quantized, args.worst)))
    return 0


def _worst(layers: Sequence, count: int) -> list[str]:
    ordered = sorted(layers, key=lambda layer: -(layer.weight_error or 0.0))
    return [f"  {layer.weight_error:.5f}      {layer.layer} ({layer.source})" for layer in ordered[:count]]
