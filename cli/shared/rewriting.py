"""What the commands that rewrite a file have in common: the preview, writing with progress, and the summary."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...quant_core.errors import RequestError, counted
from .console import print_json, size_text, table_lines
from .groups import collapse
from .interrupt import stop_on_signal
from .progress import show_progress

if TYPE_CHECKING:
    from ...quant_core.tools.rewrite import Change, Rewrite

_SHOWN = 20
EXIT_CODES = (
    "Exit code 0 means that OUTPUT is there, or with --dry-run that it could be. A file in which nothing is to be "
    "changed is not copied: the reason is printed, nothing is written, and the exit code is 1."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """INPUT, OUTPUT and the options that every rewriting command has."""
    parser.add_argument("input", metavar="INPUT", type=Path)
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, nargs="?", help="the new file, *.safetensors; not needed with --dry-run"
    )
    add_common(parser)


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show what would change and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    parser.add_argument("--json", action="store_true", help="print the changes as JSON")
    parser.set_defaults(parser=parser)


def finish(
    rewrite: Rewrite,
    args: argparse.Namespace,
    what: str,
    *,
    force: bool = False,
    nothing: str | None = None,
    reads: Sequence[Path] = (),
) -> int:
    """Preview, or write and verify; then say what changed. what: "migrating", say. Returns the exit code.

    reads: files that were read beside the rewrite's sources.
    nothing: said, without the path, where the new file would equal the old one, which is not written then. None: the
    tool always makes another file.
    """
    if args.output is None and not args.dry_run:
        args.parser.error("OUTPUT is needed, unless --dry-run shows the changes only")
    if nothing is not None and not rewrite.changes():
        raise RequestError(f"{rewrite.sources[0].path}: {nothing}{'' if args.dry_run else ' Nothing was written.'}")
    write(rewrite, args, what, force=force, reads=reads)
    if args.json:
        print_json(content(rewrite, args))
    else:
        print("\n".join(lines(rewrite, None if args.dry_run else args.output)))
    return 0


def write(
    rewrite: Rewrite, args: argparse.Namespace, what: str, *, force: bool = False, reads: Sequence[Path] = ()
) -> None:
    """Write and verify OUTPUT with progress, but for a dry run."""
    if not args.dry_run:
        with stop_on_signal() as cancel, show_progress(what) as progress:
            rewrite.apply(
                args.output, overwrite=args.overwrite, force=force, reads=reads, progress=progress, cancel=cancel
            )


def content(rewrite: Rewrite, args: argparse.Namespace, written: bool = True) -> dict[str, Any]:
    """The object that --json prints."""
    return {**rewrite.to_json(), "target": str(args.output) if written and not args.dry_run else None}


def lines(rewrite: Rewrite, target: Path | None, done: str = "written and verified") -> list[str]:
    """What changes, like changes of like layers as one row.

    target: None for a preview. done: what is said of the target.
    """
    changes = rewrite.changes()
    counts = Counter(change.kind for change in changes)
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "every tensor as it was"
    unchanged = len(rewrite.outputs) - sum(counts[kind] for kind in ("renamed", "retyped", "rewritten", "added"))
    head = (
        f"{target}: {done}, {size_text(rewrite.nbytes)}; {summary}; "
        f"{counted(unchanged, 'tensor copied as it was', 'tensors copied as they were')}"
        if target
        else f"would change: {summary}; {counted(unchanged, 'tensor stays as it is', 'tensors stay as they are')}"
    )
    rows = _rows(changes)
    left = len(rows) - _SHOWN
    more = [f"  and {counted(left, 'more row')} (--json lists every tensor)"] if left > 0 else []
    return [
        head,
        *table_lines(rows[:_SHOWN], right=(1,), indent="  "),
        *more,
        *(f"note: {note}" for note in rewrite.notes),
    ]


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
