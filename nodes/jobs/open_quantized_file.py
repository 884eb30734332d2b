"""A quantized file of the user's -> a handle, and what it is in a few lines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ...quant_core.checkpoint.source import open_source
from ...quant_core.checkpoint.suffixes import INDEX_SUFFIX, has_suffix
from ...quant_core.errors import InputFileError, counted
from ...quant_core.pipeline.verify import check_file
from ...quant_core.stored.foreign import refusal
from ...quant_core.stored.form import Form
from ...quant_core.stored.layers import stored_layers
from ...quant_core.tools.rewrite import Draft
from ..shared.detection import detect
from ..shared.folders import stamp
from ..shared.handles import QuantizedHandle, label_of
from ..shared.progress import NodeProgress
from ..shared.spool import spooled

NAME = "Open Quantized File"
_SHOWN = 3


def open_quantized(path: Path, progress: NodeProgress) -> tuple[QuantizedHandle, str]:
    """The file itself where it is one; shards become one spool file. Raises InputFileError: not readable."""
    label = label_of(path)
    if has_suffix(path.name, INDEX_SUFFIX):

        def join(spool: Path) -> dict[str, str]:
            with open_source(path) as src:
                Draft(src).finish().apply(spool, overwrite=True, progress=progress, cancel=progress.cancelled)
            return {}

        spool, _ = spooled(label, {"tool": NAME, "source": str(path), "stamp": stamp(path)}, join)
        return QuantizedHandle(spool, label, NAME, lenient=True, origins=(path,)), describe(spool, path.name)
    return QuantizedHandle(path, label, None, lenient=True), describe(path, path.name)


def describe(path: Path, name: str) -> str:
    """name: of the file as the user knows it. Never an error for what the tools can put right, or name."""
    problems: dict[str, str] = {}
    for finding in check_file(path).errors:
        problems.setdefault(finding.code, finding.message)
    with open_source(path) as source:
        try:
            forms = Counter((layer.form, layer.format.name) for layer in stored_layers(source).values())
        except InputFileError as err:
            forms, text = Counter(), str(err).removeprefix(f"{path}: ")
            problems = problems if text in problems.values() else {**problems, "": str(err)}
        foreign = refusal(source)
        lines = [
            f"{name}: {detect(path).model or 'unknown model'}, {source.nbytes / 1e9:.3f} GB, "
            f"{counted(len(source.tensors), 'tensor')}"
        ]
    lines += [
        f"{count} x {fmt}" + ("" if form is Form.COMFY_QUANT else f", {form.value} form")
        for (form, fmt), count in forms.most_common()
    ]
    older = sum(count for (form, _), count in forms.items() if form is not Form.COMFY_QUANT)
    if foreign:
        lines.append(foreign)
    elif older:
        lines.append("Migrate Legacy File turns older and foreign forms into ComfyUI's own.")
    elif problems:
        lines.append(
            f"{counted(len(problems), 'kind')} of problems. Repair lists all, and puts right what has an exact answer:"
        )
        lines += [f"  {message}" for message in list(problems.values())[:_SHOWN]]
    elif not forms:
        lines.append("Nothing in it is quantized. Load Model to Quantize takes such files.")
    return "\n".join(lines)
