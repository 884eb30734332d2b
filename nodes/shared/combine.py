"""Several files in, one spool file out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...quant_core.checkpoint.source import Source, open_source
from ...quant_core.tools.rewrite import Rewrite
from .folders import stamp
from .progress import NodeProgress, then_checking
from .spool import spooled


def combine(
    label: str,
    maker: str,
    settings: Mapping[str, Any],
    paths: Sequence[Path],
    progress: NodeProgress,
    build: Callable[[Sequence[Source]], Rewrite],
) -> tuple[Path, dict[str, Any]]:
    """The spool file that `build` makes of these files, and {"bytes", "tensors", "notes"}.

    A file that is there already is not made again.
    settings: JSON values, all that decide the result besides the files. Raises QuantPressError, and ComfyUI's
    InterruptProcessingException after Cancel; neither leaves a file.
    """

    def make(spool: Path) -> dict[str, Any]:
        with ExitStack() as stack:
            rewrite = build([stack.enter_context(open_source(path)) for path in paths])
            rewrite.apply(spool, overwrite=True, progress=then_checking(progress), cancel=progress.cancelled)
        return {"bytes": rewrite.nbytes, "tensors": len(rewrite.outputs), "notes": list(rewrite.notes)}

    return spooled(label, {"tool": maker, "files": [[str(path), stamp(path)] for path in paths], **settings}, make)
