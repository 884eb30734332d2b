"""Running a rewriting tool of the engine on a handle's file: into a spool file of its own, or as a preview.

A node gives `run_tool` a function from the open file to a Proposal. The input's file is never changed; where nothing
is to be changed, the input's handle comes out again and nothing is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comfy_execution.graph_utils import ExecutionBlocker

from ...quant_core.cancel import cancel_scope
from ...quant_core.checkpoint.source import Source, open_source
from ...quant_core.errors import counted
from ...quant_core.tools.rewrite import Change, Rewrite
from .folders import stamp
from .handles import QuantizedHandle, origins_of, spool_of
from .like_layers import like_layers
from .progress import NodeProgress, then_checking
from .spool import spooled

_SHOWN = 16
_WRITTEN = ("renamed", "retyped", "rewritten", "added")


@dataclass(frozen=True, slots=True)
class Tool:
    """A node that rewrites. name: as the node is called. settings: JSON values, all that decide the result.

    preview: say what would change and write nothing. force: leave out the check by the loaders' rules.
    reads: the user's files that it reads beside the model.
    """

    name: str
    settings: dict[str, Any]
    preview: bool = False
    force: bool = False
    reads: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a tool makes of a file. lines: shown above the changes. data: JSON values for the node itself."""

    rewrite: Rewrite
    lines: Sequence[str] = ()
    data: Any = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """quantized: for the node's output; a preview stops the nodes behind it without an error. text: for the user."""

    quantized: QuantizedHandle | ExecutionBlocker
    text: str
    data: Any = None


def run_tool(
    handle: QuantizedHandle, tool: Tool, progress: NodeProgress, build: Callable[[Source], Proposal]
) -> Outcome:
    """The handle's file rewritten by `build`; at once when this very file was made before and is still there.

    Raises QuantPressError, and ComfyUI's InterruptProcessingException after Cancel; neither leaves a file.
    """
    path = spool_of(handle)

    def make(spool: Path) -> dict[str, Any]:
        return _apply(path, None if tool.preview else spool, tool, progress, build)

    key = {"tool": tool.name, "source": str(path), "stamp": stamp(path), "preview": tool.preview, "force": tool.force}
    spool, report = spooled(handle.label, {**key, **tool.settings}, make)
    if tool.preview:
        return Outcome(ExecutionBlocker(None), report["text"], report["data"])
    result = handle
    if report["changed"]:
        origins = (*origins_of(handle), *tool.reads)
        result = replace(handle, path=spool, maker=tool.name, lenient=handle.lenient or tool.force, origins=origins)
    return Outcome(result, report["text"], report["data"])


def _apply(
    path: Path, spool: Path | None, tool: Tool, progress: NodeProgress, build: Callable[[Source], Proposal]
) -> dict[str, Any]:
    """The report: text, data, and whether anything is changed. spool: None for a preview."""
    with cancel_scope(progress.cancelled), open_source(path) as src:
        proposal = build(src)
        changes = proposal.rewrite.changes()
        if spool is not None and changes:
            proposal.rewrite.apply(
                spool, overwrite=True, force=tool.force, progress=then_checking(progress), cancel=progress.cancelled
            )
        text = "\n".join([*proposal.lines, *change_lines(proposal.rewrite, changes, written=spool is not None)])
    return {"text": text, "data": proposal.data, "changed": bool(changes)}


def change_lines(rewrite: Rewrite, changes: Sequence[Change], written: bool) -> list[str]:
    """What changes, like changes of like layers as one row. written: whether the file is there already."""
    counts = Counter(change.kind for change in changes)
    stay = len(rewrite.outputs) - sum(counts[kind] for kind in _WRITTEN)
    if not changes:
        return ["nothing to change: the file goes on as it is", *_notes(rewrite)]
    head = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    size = f"written and checked, {rewrite.nbytes / 1e9:.3f} GB" if written else "would change"
    rows = Counter((change.kind, _label(change)) for change in changes)
    lines = [f"{size}: {head}; {counted(stay, 'tensor stays', 'tensors stay')} byte for byte"]
    lines += [f"  {kind} {count} x {label}" for (kind, label), count in list(rows.items())[:_SHOWN]]
    lines += [f"  and {counted(len(rows) - _SHOWN, 'more row')}"] if len(rows) > _SHOWN else []
    return lines + _notes(rewrite)


def _notes(rewrite: Rewrite) -> list[str]:
    return [f"note: {note}" for note in rewrite.notes]


def _label(change: Change) -> str:
    name = like_layers(change.name)
    if change.kind == "renamed":
        return f"{name} (was {change.before.rpartition('.')[2]})"
    return f"{name} ({change.before} -> {change.after})" if change.kind == "retyped" else name
