"""What the commands that rewrite a file have in common: the preview, writing with progress, and the summary."""
from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import print_json, size_text
from .interrupt import stop_on_signal
from .progress import show_progress

if TYPE_CHECKING:
    from ..quant_core.tools.rewrite import Rewrite

_SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """INPUT, OUTPUT and the options that every rewriting command has."""
    parser.add_argument("input", metavar="INPUT", type=Path)
    parser.add_argument("output", metavar="OUTPUT", type=Path, nargs="?",
                        help="the new file, *.safetensors; not needed with --dry-run")
    add_common(parser)


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show what would change and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    parser.add_argument("--json", action="store_true", help="print the changes as JSON")
    parser.set_defaults(parser=parser)


def finish(rewrite: Rewrite, args: argparse.Namespace, what: str, *, force: bool = False,
           extra: dict[str, Any] | None = None) -> int:
    """Preview, or write and verify; then say what changed. what: "migrating", say. Returns the exit code."""
    if args.output is None and not args.dry_run:
        args.parser.error("OUTPUT is needed, unless --dry-run shows the changes only")
    if not args.dry_run:
        with stop_on_signal() as cancel, show_progress(what) as progress:
            rewrite.apply(args.output, overwrite=args.overwrite, force=force, progress=progress, cancel=cancel)
    content = {**rewrite.to_json(), **(extra or {}), "target": str(args.output) if not args.dry_run else None}
    if args.json:
        print_json(content)
    else:
        print("\n".join(lines(rewrite, args.output if not args.dry_run else None)))
    return 0


def lines(rewrite: Rewrite, target: Path | None) -> list[str]:
    changes = rewrite.changes()
    counts = Counter(change.kind for change in changes)
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing to change"
    shown = [f"  {change}" for change in changes[:_SHOWN]]
    if len(changes) > _SHOWN:
        shown.append(f"  and {len(changes) - _SHOWN} more (--json lists all)")
    unchanged = len(rewrite.outputs) - sum(counts[kind] for kind in ("renamed", "retyped", "rewritten", "added"))
    head = (f"{target}: written and verified, {size_text(rewrite.nbytes)}; {summary}; {unchanged} tensors copied as they were"
            if target else f"would change: {summary}; {unchanged} tensors stay as they are")
    return [head, *shown, *(f"note: {note}" for note in rewrite.notes)]
