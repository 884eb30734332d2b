"""Calibrations on disk: one safetensors file.

Header metadata `quantpress_calibration` holds one JSON object:
    schema (1), pack_version, seed, weighting, settings {staged_rows, histogram_rows, reservoir_rows, sketch_size},
    model {fingerprint, layers {name: [out_features, in_features]}},
    runs [{note, completed, steps {step: rows}, sigmas {step: sigma}, labels {label: rows}, loras}],
    layers {name: {seen, labels {label: rows}, hessian "full" | "sketch" | "diagonal"}},
    and only where model calls were kept (calls.py):
        calls {limit, max_bytes, offered, refused, kept [{key, group, tree}]}.
Tensors of every captured layer, `<layer>.<field>`; R held-out rows, S sketch rows, H histogram bins:
    absmax f32 [K], sum f64 [K], square_sum f64 [K], weight f64 [], count i64 [], nonfinite i64 [],
    histogram i64 [H], rows bf16 [R, K], row_keys f32 [R], and by kind of Hessian
    hessian f32 [K (K + 1) / 2], the upper triangle row by row, or hessian_sketch f32 [S, K], hessian_shrinkage f64 [].
Tensors of the calls, `__calls__.<number in kept>.<path in its tree>`, of whatever dtype they had. A pack that knows
nothing of calls reads such a file as one without, and leaves them out when it merges it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..cancel import poll
from ..checkpoint.header import CODE_TO_TORCH, TORCH_TO_CODE, OutputTensor, load_json_object
from ..checkpoint.sink import Sink, open_sink
from ..checkpoint.source import Source, open_source
from ..errors import InputFileError
from ..progress import Clock, Progress
from .calibration import Calibration, ModelIdentity, RunRecord
from .calls import CallSample, KeptCall, RecordedCall
from .statistics.hessian import HessianKind, Placement
from .statistics.histogram import BINS
from .statistics.layer import LayerStatistics, StatisticsSettings

METADATA_KEY = "quantpress_calibration"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """What a file's header says of one captured layer, before its tensors are there."""

    in_features: int
    kind: HessianKind
    seen: int
    labels: Mapping[str, int]


def save_calibration(
    calibration: Calibration,
    path: str | Path,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Write atomically; one layer at a time comes from the GPU. Returns the path, which must end in .safetensors.

    Raises RequestError (nothing was captured), OutputError (the disk, the target exists), Cancelled.
    """
    calibration.require_captured()
    entries = {
        layer: LayerEntry(s.in_features, s.kind, s.seen, s.labels) for layer, s in calibration.statistics.items()
    }
    return write_calibration(calibration, entries, calibration.statistics.__getitem__, path, overwrite, progress)


def write_calibration(
    header: Calibration,
    entries: Mapping[str, LayerEntry],
    statistics: Callable[[str], LayerStatistics],
    path: str | Path,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    sources: Sequence[Path] = (),
) -> Path:
    """The same with statistics that are fetched one layer at a time, in the order of `entries`.

    header: everything but its statistics is written; its calls are fetched one at a time too. sources: files being
    read, which the target must not be.
    Raises OutputError, Cancelled.
    """
    specs = {layer: _specs(entry.in_features, entry.kind, header.settings) for layer, entry in entries.items()}
    outputs = [
        OutputTensor(f"{layer}.{field}", TORCH_TO_CODE[dtype], shape)
        for layer, fields in specs.items()
        for field, (dtype, shape) in fields.items()
    ]
    calls = header.calls.kept
    outputs += [
        OutputTensor(_call_tensor(number, path), code, shape)
        for number, kept in enumerate(calls)
        for path, (code, shape) in kept.tensors.items()
    ]
    sizes = {
        layer: sum(math.prod(shape) * dtype.itemsize for dtype, shape in fields.values())
        for layer, fields in specs.items()
    }
    metadata = {METADATA_KEY: json.dumps(_manifest(header, entries), ensure_ascii=False, allow_nan=False)}
    from_calls = header.calls.nbytes
    clock = Clock(len(specs), from_calls + sum(sizes.values()), done_bytes=from_calls)
    with open_sink(path, outputs, metadata, overwrite=overwrite, sources=sources) as sink:
        _write_calls(sink, calls)
        for layer, fields in specs.items():
            poll()
            tensors = statistics(layer).tensors()
            for field, (dtype, _) in fields.items():
                sink.write(f"{layer}.{field}", tensors[field].to("cpu", dtype))
            state = clock.advance(layer, sizes[layer])
            if progress is not None:
                progress(state)
        sink.commit()
    return Path(path)


class CalibrationReader:
    """An open calibration file: the manifest at once, layers one by one. Made by open_calibration."""

    def __init__(self, source: Source) -> None:
        self._source = source
        text = source.metadata.get(METADATA_KEY)
        if text is None:
            raise InputFileError(
                f"{source.path}: this is not a calibration: its header has no {METADATA_KEY}. "
                "Give a file that Save Calibration or `quantpress calibration merge` wrote."
            )
        manifest = load_json_object(text.encode("utf-8"), f"{source.path}: {METADATA_KEY}")
        if manifest.get("schema") != SCHEMA:
            raise InputFileError(
                f"{source.path}: the calibration has schema {manifest.get('schema')!r}; this pack "
                f"reads {SCHEMA}. Update the pack, or capture again."
            )
        try:
            self._read_manifest(manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise InputFileError(
                f"{source.path}: {METADATA_KEY} is damaged ({type(err).__name__}: {err}). Capture again."
            ) from err

    def _read_manifest(self, manifest: dict) -> None:
        model = manifest["model"]
        layers = {name: (int(shape[0]), int(shape[1])) for name, shape in model["layers"].items()}
        self._layers: dict[str, dict] = dict(manifest["layers"])
        unknown = [name for name in self._layers if name not in layers]
        if unknown:
            raise ValueError(f"{unknown[0]} has statistics and no shape")
        self.header = Calibration(
            ModelIdentity(layers, str(model["fingerprint"])),
            {},
            tuple(_run(run) for run in manifest["runs"]),
            int(manifest["seed"]),
            StatisticsSettings(**manifest["settings"]),
            str(manifest["weighting"]),
            str(manifest["pack_version"]),
        )
        if "calls" in manifest:
            self.header.calls = CallSample.from_json(
                manifest["calls"], self._call_info, lambda number, path: self._source.read(_call_tensor(number, path))
            )

    @property
    def call_count(self) -> int:
        """How many model calls were kept; 0 also in a file from before there were any."""
        return len(self.header.calls.kept)

    def calls(self) -> Iterator[RecordedCall]:
        """The kept model calls, read one at a time; the first n are an even sample of all, too.

        Raises InputFileError.
        """
        return self.header.calls.calls()

    @property
    def layers(self) -> tuple[str, ...]:
        """The captured layers."""
        return tuple(self._layers)

    def kind(self, layer: str) -> HessianKind:
        """What is kept of the layer's Hessian. KeyError when the layer was not captured."""
        return HessianKind(self._layers[layer]["hessian"])

    def entry(self, layer: str) -> LayerEntry:
        """KeyError when the layer was not captured."""
        found = self._layers[layer]
        return LayerEntry(
            self.header.model.layers[layer][1],
            self.kind(layer),
            int(found["seen"]),
            {str(k): int(v) for k, v in found["labels"].items()},
        )

    def statistics(self, layer: str, device: torch.device | str = "cpu") -> LayerStatistics:
        """Read one layer. KeyError when it was not captured; InputFileError when its tensors are damaged."""
        entry = self.entry(layer)
        result = LayerStatistics(entry.in_features, device, entry.kind, Placement.DEVICE, self.header.settings)
        found = {}
        for field, (dtype, shape) in _specs(entry.in_features, entry.kind, self.header.settings).items():
            name = f"{layer}.{field}"
            info = self._source.tensors.get(name)
            if info is None or info.dtype != TORCH_TO_CODE[dtype] or info.shape != shape:
                what = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
                raise InputFileError(
                    f"{self._source.path}: {name} {what}; {TORCH_TO_CODE[dtype]} {list(shape)} is "
                    "needed. Capture again."
                )
            found[field] = self._source.read(name)
        result.restore(found)
        result.seen, result.labels = entry.seen, dict(entry.labels)
        return result

    def _call_info(self, number: int, path: str) -> tuple[str, tuple[int, ...]]:
        """(dtype code, shape) of a call's tensor. Raises InputFileError."""
        name = _call_tensor(number, path)
        info = self._source.tensors.get(name)
        if info is None or info.dtype not in CODE_TO_TORCH:
            what = "is missing" if info is None else f"is {info.dtype}, which this torch cannot hold"
            raise InputFileError(
                f"{self._source.path}: {name} {what}; it is part of a recorded model call. Capture again."
            )
        return info.dtype, info.shape


@contextmanager
def open_calibration(path: str | Path) -> Iterator[CalibrationReader]:
    """Raises InputFileError."""
    with open_source(path) as source:
        yield CalibrationReader(source)


def load_calibration(path: str | Path, device: torch.device | str = "cpu") -> Calibration:
    """The whole file in memory; open_calibration reads layer by layer. Raises InputFileError."""
    with open_calibration(path) as reader:
        reader.header.statistics = {layer: reader.statistics(layer, device) for layer in reader.layers}
        reader.header.calls = reader.header.calls.in_memory()
        return reader.header


def _specs(k: int, kind: HessianKind, settings: StatisticsSettings) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What a layer's tensors are on disk, without touching the data."""
    f32, f64, i64 = torch.float32, torch.float64, torch.int64
    specs = {
        "absmax": (f32, (k,)),
        "sum": (f64, (k,)),
        "square_sum": (f64, (k,)),
        "weight": (f64, ()),
        "count": (i64, ()),
        "nonfinite": (i64, ()),
        "histogram": (i64, (BINS,)),
        "rows": (torch.bfloat16, (settings.reservoir_rows, k)),
        "row_keys": (f32, (settings.reservoir_rows,)),
    }
    if kind is HessianKind.FULL:
        specs["hessian"] = (f32, (k * (k + 1) // 2,))
    elif kind is HessianKind.SKETCH:
        specs |= {"hessian_sketch": (f32, (settings.sketch_size, k)), "hessian_shrinkage": (f64, ())}
    return specs


def _call_tensor(number: int, path: str) -> str:
    """Its name in the file: none of a layer's, for no module's name begins so."""
    return f"__calls__.{number}.{path}"


def _write_calls(sink: Sink, calls: Sequence[KeptCall]) -> None:
    for number, kept in enumerate(calls):
        poll()
        for path in kept.tensors:
            sink.write(_call_tensor(number, path), kept.fetch(path))


def _manifest(calibration: Calibration, entries: Mapping[str, LayerEntry]) -> dict[str, object]:
    calls = {"calls": calibration.calls.to_json()} if calibration.calls.limit else {}
    return {
        "schema": SCHEMA,
        "pack_version": calibration.pack_version,
        "seed": calibration.seed,
        "weighting": calibration.weighting,
        "settings": asdict(calibration.settings),
        "model": {
            "fingerprint": calibration.model.fingerprint,
            "layers": {name: list(shape) for name, shape in calibration.model.layers.items()},
        },
        "runs": [
            {
                "note": run.note,
                "completed": run.completed,
                "steps": dict(run.steps),
                "sigmas": dict(run.sigmas),
                "labels": dict(run.labels),
                "loras": list(run.loras),
            }
            for run in calibration.runs
        ],
        "layers": {
            layer: {"seen": entry.seen, "labels": dict(entry.labels), "hessian": entry.kind.value}
            for layer, entry in entries.items()
        },
        **calls,
    }


def _run(entry: dict) -> RunRecord:
    return RunRecord(
        str(entry["note"]),
        bool(entry["completed"]),
        {int(k): int(v) for k, v in entry["steps"].items()},
        {int(k): float(v) for k, v in entry["sigmas"].items()},
        {str(k): int(v) for k, v in entry["labels"].items()},
        tuple(map(str, entry["loras"])),
    )
