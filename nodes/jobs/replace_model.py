"""A diffusion model in the place of the one in a full checkpoint."""

from __future__ import annotations

from pathlib import Path

from ...quant_core.checkpoint.source import open_source
from ...quant_core.tools.merge import insert
from ..shared.checkpoint_prefix import prefix_of
from ..shared.combine import combine
from ..shared.detection import detect
from ..shared.handles import QuantizedHandle, SourceHandle, label_of, origins_of, spool_of
from ..shared.progress import NodeProgress

CHECKPOINTS = "checkpoints"
NAME = "Put Back into Checkpoint"


def replace_model(
    model: QuantizedHandle | SourceHandle, checkpoint: Path, prefix: str, force: bool, progress: NodeProgress
) -> tuple[QuantizedHandle, str]:
    """Raises PlanError: the two hold different weights; RequestError: the file is not a full checkpoint."""
    path, found = spool_of(model), prefix_of(checkpoint, prefix)
    label = label_of(checkpoint)
    spool, report = combine(
        label,
        NAME,
        {"prefix": found, "force": force},
        [checkpoint, path],
        progress,
        lambda files: insert(files[0], files[1], found, force=force),
    )
    with open_source(checkpoint) as src:
        before = src.nbytes
    text = (
        f"{detect(spool).model or 'unknown model'}: {model.label} in the place of the diffusion model in "
        f"{checkpoint.name}, {before / 1e9:.3f} GB -> {report['bytes'] / 1e9:.3f} GB"
    )
    lora = model.lora if isinstance(model, QuantizedHandle) else None
    origins = (*origins_of(model), checkpoint)
    return QuantizedHandle(spool, label, NAME, lenient=True, lora=lora, origins=origins), text
