"""`quantpress repair`: what is wrong with a quantized file, and the same file put right; `cleanup` for legacy ones."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...quant_core.errors import counted
from ..shared import rewriting
from ..shared.console import print_json
from ..shared.groups import collapse_sentences
from ..shared.wording import in_flags

if TYPE_CHECKING:
    from ...quant_core.checkpoint.source import Source
    from ...quant_core.tools.repair import Repair


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "repair",
        help="find and repair what keeps a quantized file from loading",
        description="List what is wrong with a quantized file, each with a code, and write a repaired "
        "one. Only what has one exact answer is changed. Without OUTPUT it only lists.",
        epilog="Exit code 0: the file has no error, or OUTPUT has none; a sound file is not copied. "
        "Exit code 1: an error stays, in OUTPUT too.",
    )
    rewriting.add_arguments(parser)
    parser.add_argument(
        "--assume",
        metavar="FORMAT",
        help="the format of layers without metadata whose tensors fit several: "
        "int8_rowwise, int8_convrot, nvfp4, modelopt ...",
    )
    parser.add_argument(
        "--unswizzled",
        action="store_true",
        help="the block scales of NVFP4 and MXFP8 are in row order, even where their shape does not show it",
    )
    parser.add_argument(
        "--against",
        metavar="SOURCE",
        help="the model that the file was made from: finds out by itself what "
        "--assume and --unswizzled would have to say",
    )
    parser.set_defaults(run=run)
    _add_cleanup(commands)


def run(args: argparse.Namespace) -> int:
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.tools.repair import repair

    args.dry_run = args.dry_run or args.output is None
    with open_source(args.input) as src:
        reads = _look_at_source(args, src) if args.against else ()
        result = repair(src, assume=args.assume, unswizzled=args.unswizzled)
        changes = bool(result.rewrite.changes())
        if changes:
            rewriting.write(result.rewrite, args, "repairing", reads=reads)
        if args.json:
            print_json({**rewriting.content(result.rewrite, args, changes), "findings": result.to_json()["findings"]})
        else:
            print("\n".join(_lines(result, args, changes)))
    stay = sum(finding.severity == "error" for finding in result.unfixed)
    if stay:
        where = f"{args.output} was written, and" if changes and not args.dry_run else f"{args.input}:"
        print(
            f"quantpress: error: {where} {counted(stay, 'error remains', 'errors remain')} that no exact repair "
            "exists for; the list above says what to do",
            file=sys.stderr,
        )
    return int(stay > 0)


def _look_at_source(args: argparse.Namespace, src: Source) -> tuple[Path, ...]:
    """Set --assume and --unswizzled to what decodes to the source; returns its files."""
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.tools.against import find_layout

    if args.assume or args.unswizzled:
        args.parser.error("--against finds the layout: leave out --assume and --unswizzled")
    with open_source(args.against) as reference:
        layout = find_layout(src, reference)
    args.assume, args.unswizzled = layout.assume, layout.unswizzled
    if not args.json:
        words = [f"--assume {layout.assume}"] * bool(layout.assume) + ["--unswizzled"] * layout.unswizzled
        print(
            f"against the source: {layout.layer} is {layout.error:.4f} off"
            f"{' with ' + ' '.join(words) if words else ''}"
        )
    return reference.files


def _lines(result: Repair, args: argparse.Namespace, changes: bool) -> list[str]:
    """What was found, apart by what became of it; then the file."""
    from ...quant_core.tools.contents import describe

    preview = args.dry_run
    fixed = [finding for finding in result.findings if finding not in result.unfixed]
    lines = [] if result.findings else [f"{args.input}: no problems found; {describe(result.rewrite.sources[0])}"]
    for found, title in (
        (fixed, "can be put right" if preview else "put right"),
        (result.unfixed, "would remain" if preview and changes else "remaining"),
    ):
        if found:
            texts = collapse_sentences(
                f"{finding.severity}: {in_flags(finding.problem, args)} [{finding.code}]" for finding in found
            )
            lines += [f"{title}: {counted(len(found), 'problem')}", *(f"  {text}" for text in texts)]
    if not changes:
        why = (
            "none of it can be put right exactly."
            if result.findings
            else "there is nothing to put right. Use the file as it is."
        )
        return lines + ([] if preview else [f"nothing was written: {why}"])
    done = "written and read back; not all is put right" if result.unfixed else "written and verified"
    return lines + rewriting.lines(result.rewrite, None if preview else args.output, done)


def _add_cleanup(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "cleanup",
        help="tidy a legacy fp8_scaled file that stays legacy",
        description="Drop scales beside weights that are not FP8, set the marker, and make scales of "
        "one element plain numbers. To leave the legacy form use `quantpress migrate`.",
        epilog=rewriting.EXIT_CODES,
    )
    rewriting.add_arguments(parser)
    parser.add_argument(
        "--marker",
        type=int,
        choices=(0, 2),
        default=0,
        help="elements of the scaled_fp8 marker; 2 asks for full precision (default: %(default)s)",
    )
    parser.add_argument("--scale-input", action="store_true", help="add scale_input 1.0 where an FP8 layer has none")
    parser.add_argument(
        "--keep-shapes", action="store_true", help="leave scales of one element in the shape they have"
    )
    parser.add_argument(
        "--only-scale-input",
        action="store_true",
        help="only add scale_input 1.0 and a marker of one element; all else stays",
    )
    parser.set_defaults(run=_cleanup)


def _cleanup(args: argparse.Namespace) -> int:
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.tools.cleanup import add_legacy_input, cleanup_legacy

    with open_source(args.input) as src:
        rewrite = (
            add_legacy_input(src)
            if args.only_scale_input
            else cleanup_legacy(src, marker=args.marker, scale_input=args.scale_input, normalise=not args.keep_shapes)
        )
        return rewriting.finish(
            rewrite, args, "cleaning up", nothing="it is tidy in this way already; use it as it is."
        )
