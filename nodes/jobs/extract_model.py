"""The diffusion model of a full checkpoint, as a source of its own."""

from __future__ import annotations

from ...quant_core.checkpoint.source import open_source
from ...quant_core.errors import counted
from ...quant_core.tools.merge import extract
from ..shared.checkpoint_prefix import prefix_of
from ..shared.combine import combine
from ..shared.detection import detect
from ..shared.handles import SourceHandle, origins_of, spool_of
from ..shared.progress import NodeProgress

NAME = "Extract Diffusion Model"


def extract_model(source: SourceHandle, prefix: str, progress: NodeProgress) -> tuple[SourceHandle, str]:
    """Raises RequestError: the file is not a full checkpoint."""
    path = spool_of(source)
    found = prefix_of(path, prefix)
    spool, report = combine(
        source.label, NAME, {"prefix": found}, [path], progress, lambda files: extract(files[0], found)
    )
    with open_source(path) as src:
        rest = len(src.tensors) - report["tensors"]
    text = (
        f"{detect(spool).model or 'unknown model'}: {counted(report['tensors'], 'tensor')} under {found or ''!r}, "
        f"{report['bytes'] / 1e9:.3f} GB; {rest} others left out"
    )
    return SourceHandle(spool, source.label, NAME, origins_of(source)), text
