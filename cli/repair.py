"""`quantpress repair`: what is wrong with a quantized file, and the same file put right; `cleanup` for legacy ones."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import rewriting
from .console import print_json

if TYPE_CHECKING:
    from ..quant_core.checkpoint.source import Source
    from ..quant_core.tools.repair import Repair


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("repair", help="find and repair what keeps a quantized file from loading",
                                 description="List what is wrong with a quantized file, each with a code, and write a repaired "
                                             "one. Only what has one exact answer is changed. Without OUTPUT it only lists.",
                                 epilog="Exit code 1 when something stays that cannot be repaired.")
    rewriting.add_arguments(parser)
    parser.add_argument("--assume", metavar="FORMAT", help="the format of layers without metadata whose tensors fit several: "
                                                           "int8_rowwise, int8_convrot, nvfp4, modelopt ...")
    parser.add_argument("--unswizzled", action="store_true",
                        help="the block scales of NVFP4 and MXFP8 are in row order, even where their shape does not show it")
    parser.add_argument("--against", metavar="SOURCE", help="the model that the file was made from: finds out by itself what "
                                                           "--assume and --unswizzled would have to say")
    parser.set_defaults(run=run)
    _add_cleanup(commands)


def run(args: argparse.Namespace) -> int:
    from ..quant_core.checkpoint.source import open_source
    from ..quant_core.tools.repair import repair

    args.dry_run = args.dry_run or args.output is None
    with open_source(args.input) as src:
        if args.against:
            _look_at_source(args, src)
        result = repair(src, assume=args.assume, unswizzled=args.unswizzled)
        stays = any(finding.severity == "error" for finding in result.unfixed)
        if args.json and args.dry_run:
            print_json(result.to_json())
        else:
            if not args.json:
                print("\n".join(_lines(result)))
            rewriting.finish(result.rewrite, args, "repairing", extra={"findings": result.to_json()["findings"]})
    return int(stays)


def _look_at_source(args: argparse.Namespace, src: Source) -> None:
    """Set --assume and --unswizzled to what decodes to the source."""
    from ..quant_core.checkpoint.source import open_source
    from ..quant_core.tools.against import find_layout

    if args.assume or args.unswizzled:
        args.parser.error("--against finds the layout: leave out --assume and --unswizzled")
    with open_source(args.against) as reference:
        layout = find_layout(src, reference)
    args.assume, args.unswizzled = layout.assume, layout.unswizzled
    if not args.json:
        words = [f"--assume {layout.assume}"] * bool(layout.assume) + ["--unswizzled"] * layout.unswizzled
        print(f"against the source: {layout.layer} is {layout.error:.4f} off{' with ' + ' '.join(words) if words else ''}")


def _lines(result: Repair) -> list[str]:
    if not result.findings:
        return ["no problems found"]
    return [f"{finding.severity}: {finding.message} [{finding.code}]{' (not repaired)' if finding in result.unfixed else ''}"
            for finding in result.findings]


def _add_cleanup(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("cleanup", help="tidy a legacy fp8_scaled file that stays legacy",
                                 description="Drop scales beside weights that are not FP8, set the marker, and make scales of "
                                             "one element plain numbers. To leave the legacy form use `quantpress migrate`.")
    rewriting.add_arguments(parser)
    parser.add_argument("--marker", type=int, choices=(0, 2), default=0,
                        help="elements of the scaled_fp8 marker; 2 asks for full precision (default: %(default)s)")
    parser.add_argument("--scale-input", action="store_true", help="add scale_input 1.0 where an FP8 layer has none")
    parser.add_argument("--keep-shapes", action="store_true", help="leave scales of one element in the shape they have")
    parser.add_argument("--only-scale-input", action="store_true",
                        help="only add scale_input 1.0 and a marker of one element; all else stays")
    parser.set_defaults(run=_cleanup)


def _cleanup(args: argparse.Namespace) -> int:
    from ..quant_core.checkpoint.source import open_source
    from ..quant_core.tools.cleanup import add_legacy_input, cleanup_legacy

    with open_source(args.input) as src:
        rewrite = add_legacy_input(src) if args.only_scale_input else cleanup_legacy(
            src, marker=args.marker, scale_input=args.scale_input, normalise=not args.keep_shapes)
        return rewriting.finish(rewrite, args, "cleaning up")
