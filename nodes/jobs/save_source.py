"""A source as one file."""

from __future__ import annotations

from pathlib import Path

from ...quant_core.checkpoint.suffixes import INDEX_SUFFIX, has_suffix
from ...quant_core.tools.merge import join
from ..shared.combine import combine
from ..shared.handles import SourceHandle, spool_of
from ..shared.progress import NodeProgress

NAME = "Save Model"


def one_file(source: SourceHandle, progress: NodeProgress) -> Path:
    """The source's file; shards are joined into a spool file first."""
    path = spool_of(source)
    if not has_suffix(path.name, INDEX_SUFFIX):
        return path
    return combine(source.label, NAME, {}, [path], progress, lambda files: join(files[0]))[0]
