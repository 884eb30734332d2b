"""LoRA files baked into a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...quant_core.checkpoint.source import Source, open_source
from ...quant_core.tools.lora import bake
from ...quant_core.tools.rewrite import Rewrite
from ..shared.combine import combine
from ..shared.folders import LORAS, list_models
from ..shared.handles import SourceHandle, label_of, origins_of, spool_of
from ..shared.progress import NodeProgress

NAME = "Bake LoRA"


@dataclass(frozen=True, eq=False)
class BakedHandle(SourceHandle):
    """A model with LoRAs baked in.

    origin: the source before the first LoRA. A further one is baked from there: all are rounded once, together.
    loras: (path, strength), in order. skip: some of them has layers that the model has not.
    """

    origin: SourceHandle | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    skip: bool = False


def list_loras() -> list[str]:
    """Names as the stock LoRA loaders list them."""
    return [name.removeprefix(f"{LORAS}/") for name in list_models(LORAS, shards=False)]


def bake_lora(
    source: SourceHandle, lora: Path, strength: float, skip_unmatched: bool, progress: NodeProgress
) -> tuple[BakedHandle, str]:
    """The source with one more LoRA in a spool file, and what was done.

    Raises PlanError: layers that the model lacks, shapes that do not fit, other kinds of adapters, quantized weights.
    """
    path = spool_of(source)
    with open_source(path) as src, open_source(lora) as one:  # this one by its own setting, before anything is written
        notes = bake(src, [(one, strength)], skip_unmatched=skip_unmatched).notes
    origin, skip = source, skip_unmatched
    before: tuple[tuple[Path, float], ...] = ()
    if isinstance(source, BakedHandle) and source.origin is not None and source.origin.path.is_file():
        origin, before, skip = source.origin, source.loras, skip_unmatched or source.skip
    loras = (*before, (lora, strength))

    def build(sources: Sequence[Source]) -> Rewrite:
        model, *files = sources
        return bake(
            model, [(file, weight) for file, (_, weight) in zip(files, loras, strict=True)], skip_unmatched=skip
        )

    spool, report = combine(
        source.label,
        NAME,
        {"strengths": [weight for _, weight in loras], "skip": skip},
        [origin.path, *(file for file, _ in loras)],
        progress,
        build,
    )
    if before:
        notes = (*notes, f"together with {len(before)} before it, rounded once")
    text = "\n".join([f"{lora.name} at strength {strength:g}: {report['bytes'] / 1e9:.3f} GB", *notes])
    origins = (*origins_of(source), lora)
    return BakedHandle(spool, f"{source.label}-{label_of(lora)}", NAME, origins, origin, loras, skip), text
