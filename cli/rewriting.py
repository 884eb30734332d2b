"""What the commands that rewrite a file have in common: the preview, writing with progress, and the summary."""
from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import print_json, size_text, table_lines
from .groups import collapse
from .interrupt import stop_on_signal
from .progress import show_progress

if TYPE_CHECKING:
    from ..quant_core.tools.rewrite import Change, Rewrite

_SHOWN = 20


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
    unchanged = len(rewrite.outputs) - sum(counts[kind] for kind in ("renamed", "retyped", "rewritten", "added"))
    head = (f"{target}: written and verified, {size_text(rewrite.nbytes)}; {summary}; {unchanged} tensors copied as they were"
            if target else f"would change: {summary}; {unchanged} tensors stay as they are")
    rows = _rows(changes)
    more = [f"  and {len(rows) - _SHOWN} more rows (--json lists every tensor)"] if len(rows) > _SHOWN else []
    return [head, *table_lines(rows[:_SHOWN], right=(1,), indent="  "), *more, *(f"note: {note}" for note in rewrite.notes)]


def _rows(changes: Sequence[Change]) -> list[tuple[str, str, str]]:
    """Like changes of like layers as one row: what, how many, where."""
    named: dict[str, list[str]] = {}
    for change in changes:
        named.setdefault(change.kind, []).append(_label(change))
    return [(kind, f"{count}x", pattern) for kind, names in named.items() for pattern, count in collapse(names)]


def _label(change: Change) -> str:
    if change.kind == "renamed":
        return f"{change.name} (was {change.before.rpartition('.')[2]})"
    return f"{change.name} ({change.before} -> {change.after})" if change.kind == "retyped" else change.name
