"""Files put together, taken apart and decoded: several sources in, one spool file out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ...quant_core.checkpoint.source import Source, open_source
from ...quant_core.errors import RequestError
from ...quant_core.tools.rewrite import Rewrite
from ..shared.detection import checkpoint_prefix
from ..shared.folders import stamp
from ..shared.handles import QuantizedType, SourceType
from ..shared.progress import NodeProgress
from ..shared.rewriting import told
from ..shared.spool import spooled

PREFIX_TOOLTIP = (
    "What the names of the diffusion model's tensors begin with. Empty: as ComfyUI finds it, right for every "
    "checkpoint it loads. Fill it in for files of other programs, with the last dot."
)


def model_input(name: str, tooltip: str) -> Any:
    """An input that takes a quantized model and a source alike."""
    return io.MultiType.Input(name, types=[QuantizedType, SourceType], tooltip=tooltip)


def combined(
    label: str,
    maker: str,
    settings: Mapping[str, Any],
    paths: Sequence[Path],
    progress: NodeProgress,
    build: Callable[[Sequence[Source]], Rewrite],
) -> tuple[Path, dict[str, Any]]:
    """The spool file that `build` makes of these files, and {"bytes", "tensors", "notes"}; at once when it is there already.

    settings: JSON values, all that decide the result besides the files. Raises QuantPressError, and ComfyUI's
    InterruptProcessingException after Cancel; neither leaves a file.
    """

    def make(spool: Path) -> dict[str, Any]:
        with ExitStack() as stack:
            rewrite = build([stack.enter_context(open_source(path)) for path in paths])
            rewrite.apply(spool, overwrite=True, progress=told(progress), cancel=progress.cancelled)
        return {"bytes": rewrite.nbytes, "tensors": len(rewrite.outputs), "notes": list(rewrite.notes)}

    return spooled(label, {"tool": maker, "files": [[str(path), stamp(path)] for path in paths], **settings}, make)


def prefix_of(path: Path, given: str) -> str:
    """The prefix that the user gave, or the one that ComfyUI finds. RequestError when no tensor begins with it."""
    prefix = given.strip() or checkpoint_prefix(path)
    with open_source(path) as src:
        if any(name.startswith(prefix) for name in src.tensors):
            return prefix
        names = list(src.tensors)
    what = f"no tensor begins with {prefix!r}" if given.strip() else "ComfyUI finds no full checkpoint in it"
    raise RequestError(
        f"{path.name}: {what}; its tensors are called like {names[len(names) // 2]!r}. A diffusion model alone "
        "needs no such step; for a checkpoint of another program, fill in prefix."
    )
