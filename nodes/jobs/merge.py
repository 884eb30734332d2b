"""The diffusion model of a checkpoint out of it and back, shards and one file, on handles."""

from __future__ import annotations

from pathlib import Path

from comfy import model_management

from ...quant_core.checkpoint.source import INDEX_SUFFIX, open_source
from ...quant_core.errors import Cancelled, OutputError, RequestError, counted
from ...quant_core.tools.merge import extract, insert, join, split
from ..shared.detection import detect
from ..shared.handles import QuantizedHandle, SourceHandle, spool_of
from ..shared.progress import NodeProgress
from ..shared.source_text import label_of
from .exchange import combined, prefix_of

CHECKPOINTS = "checkpoints"
EXTRACT, REPLACE, SAVE = "Extract Diffusion Model", "Put Back into Checkpoint", "Save Model"
_GB = 10**9
_INDEX_END = INDEX_SUFFIX.removeprefix(".safetensors")


def extract_model(source: SourceHandle, prefix: str, progress: NodeProgress) -> tuple[SourceHandle, str]:
    """Raises RequestError: the file is not a full checkpoint."""
    path = spool_of(source)
    found = prefix_of(path, prefix)
    spool, report = combined(
        source.label, EXTRACT, {"prefix": found}, [path], progress, lambda files: extract(files[0], found)
    )
    with open_source(path) as src:
        rest = len(src.tensors) - report["tensors"]
    text = (
        f"{detect(spool).model or 'unknown model'}: {counted(report['tensors'], 'tensor')} under {found!r}, {report['bytes'] / 1e9:.3f} GB; "
        f"{rest} others left out"
    )
    return SourceHandle(spool, source.label, EXTRACT), text


def replace_model(
    model: QuantizedHandle | SourceHandle, checkpoint: Path, prefix: str, force: bool, progress: NodeProgress
) -> tuple[QuantizedHandle, str]:
    """Raises PlanError: the two hold different weights; RequestError: the file is not a full checkpoint."""
    path, found = spool_of(model), prefix_of(checkpoint, prefix)
    label = label_of(checkpoint)
    spool, report = combined(
        label,
        REPLACE,
        {"prefix": found, "force": force},
        [checkpoint, path],
        progress,
        lambda files: insert(files[0], files[1], found, force=force),
    )
    with open_source(checkpoint) as src:
        before = src.nbytes
    text = (
        f"{detect(spool).model or 'unknown model'}: {model.label} in the place of the diffusion model in {checkpoint.name}, "
        f"{before / 1e9:.3f} GB -> {report['bytes'] / 1e9:.3f} GB"
    )
    lora = model.lora if isinstance(model, QuantizedHandle) else None
    return QuantizedHandle(spool, label, REPLACE, lenient=True, lora=lora), text


def one_file(source: SourceHandle, progress: NodeProgress) -> Path:
    """The source's file; shards are joined into a spool file first."""
    path = spool_of(source)
    if not path.name.endswith(INDEX_SUFFIX):
        return path
    return combined(source.label, SAVE, {}, [path], progress, lambda files: join(files[0]))[0]


def write_shards(
    model: QuantizedHandle | SourceHandle, target: Path, max_gb: float, progress: NodeProgress
) -> tuple[Path, str]:
    """Shards and their index beside `target`, a *.safetensors name. OutputError: a file of such a name is there already."""
    index = target.with_name(target.name + _INDEX_END)
    taken = [path.name for path in target.parent.glob("*") if _is_shard(path.name, target.stem)]
    if taken or index.exists():
        raise OutputError(
            f"{index.parent}: there are shards of this name already ({(taken or [index.name])[0]}). Choose another name."
        )
    try:
        with open_source(spool_of(model)) as src:
            shards = split(src, index, round(max_gb * _GB), progress=progress, cancel=progress.cancelled)
    except Cancelled:
        model_management.throw_exception_if_processing_interrupted()
        raise
    except RequestError as err:
        raise RequestError(f"{err} (max_gb)") from err
    sizes = [path.stat().st_size for path in shards]
    return (
        index,
        f"{counted(len(shards), 'shard')} of at most {max(sizes) / 1e9:.3f} GB, {sum(sizes) / 1e9:.3f} GB together",
    )


def _is_shard(name: str, stem: str) -> bool:
    return name.startswith(f"{stem}-") and "-of-" in name and name.endswith(".safetensors")
