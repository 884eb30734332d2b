"""A model as shards and their index."""

from __future__ import annotations

from pathlib import Path

from comfy import model_management

from ...quant_core.checkpoint.source import open_source
from ...quant_core.checkpoint.suffixes import INDEX_SUFFIX, SUFFIX, has_suffix
from ...quant_core.errors import Cancelled, OutputError, counted
from ...quant_core.tools.merge import split
from ..shared.handles import QuantizedHandle, SourceHandle, origins_of, spool_of
from ..shared.progress import NodeProgress
from ..shared.publish import keep_origins

_GB = 10**9
_INDEX_END = INDEX_SUFFIX.removeprefix(SUFFIX)


def write_shards(
    model: QuantizedHandle | SourceHandle, target: Path, max_gb: float, progress: NodeProgress
) -> tuple[Path, str]:
    """Shards and their index beside `target`, a *.safetensors name.

    OutputError: a file of such a name is there already, or the index is the source's.
    """
    index = target.with_name(target.name + _INDEX_END)
    keep_origins(index, origins_of(model))
    taken = [path.name for path in target.parent.glob("*") if _is_shard(path.name, target.stem)]
    if taken or index.exists():
        raise OutputError(
            f"{index.parent}: there are shards of this name already ({(taken or [index.name])[0]}). "
            "Choose another name."
        )
    try:
        with open_source(spool_of(model)) as src:
            shards = split(src, index, round(max_gb * _GB), progress=progress, cancel=progress.cancelled)
    except Cancelled:
        model_management.throw_exception_if_processing_interrupted()
        raise
    sizes = [path.stat().st_size for path in shards]
    return (
        index,
        f"{counted(len(shards), 'shard')} of at most {max(sizes) / 1e9:.3f} GB, {sum(sizes) / 1e9:.3f} GB together",
    )


def _is_shard(name: str, stem: str) -> bool:
    return name.startswith(f"{stem}-") and "-of-" in name and has_suffix(name, SUFFIX)
