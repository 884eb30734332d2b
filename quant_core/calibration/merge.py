"""Several calibration files as one, a layer at a time: memory holds two layers' statistics, not more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import RequestError
from ..progress import Progress
from .statistics.layer import LayerStatistics, require_same_kind
from .storage import CalibrationReader, LayerEntry, open_calibration, write_calibration


@dataclass(frozen=True, slots=True)
class Merged:
    """How many of each the new file holds. calls: model calls kept whole."""

    layers: int
    runs: int
    calls: int = 0


def merge_files(
    paths: Sequence[str | Path],
    target: str | Path,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Merged:
    """Add captures of one model up.

    Raises InputFileError, OutputError, Cancelled, and RequestError before anything is written: the files do not belong
    together.
    """
    with ExitStack() as stack:
        readers = [stack.enter_context(open_calibration(path)) for path in paths]
        first = readers[0].header
        for path, reader in zip(paths[1:], readers[1:], strict=True):
            try:
                first.require_mergeable(reader.header)
            except RequestError as err:
                raise RequestError(f"{path} cannot be added to {paths[0]}: {err}") from err
        header = replace(first, statistics={}, runs=tuple(run for reader in readers for run in reader.header.runs))
        for reader in readers[1:]:
            header.calls.merge(reader.header.calls)
        entries = {layer: _entry(readers, layer) for reader in readers for layer in reader.layers}
        write_calibration(
            header,
            entries,
            lambda layer: _statistics(readers, layer),
            target,
            overwrite,
            progress,
            [Path(path) for path in paths],
        )
    return Merged(len(entries), len(header.runs), len(header.calls.kept))


def _entry(readers: Sequence[CalibrationReader], layer: str) -> LayerEntry:
    first, *others = [reader.entry(layer) for reader in readers if layer in reader.layers]
    labels = dict(first.labels)
    for other in others:
        require_same_kind(layer, first.kind, other.kind)
        for label, rows in other.labels.items():
            labels[label] = labels.get(label, 0) + rows
    return replace(first, seen=first.seen + sum(other.seen for other in others), labels=labels)


def _statistics(readers: Sequence[CalibrationReader], layer: str) -> LayerStatistics:
    holding = [reader for reader in readers if layer in reader.layers]
    merged = holding[0].statistics(layer)
    for reader in holding[1:]:
        merged.merge(reader.statistics(layer), layer)
    return merged
