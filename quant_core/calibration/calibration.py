"""A calibration: the statistics of a model's layers, and what they were captured from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .._version import __version__
from ..cancel import poll
from ..checkpoint.source import Source
from ..errors import RequestError, some_of
from .calls import CallSample
from .statistics.layer import LayerStatistics, StatisticsSettings

FINGERPRINT_VALUES = 32


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model. layers: name -> (out_features, in_features). fingerprint: of the weights, "" when unknown."""

    layers: Mapping[str, tuple[int, int]]
    fingerprint: str = ""

    def problems(self, other: ModelIdentity) -> list[str]:
        """Why a calibration of `self` does not fit the model `other`, one phrase each; [] when it does.

        The model may have layers that were not captured, but not the reverse. Fingerprints are compared when both are
        known and the layers agree.
        """
        missing = [name for name in self.layers if name not in other.layers]
        found = [f"the model has no {some_of(missing, shown=4)}"] if missing else []
        found += [
            f"{name} is {list(shape)} in the calibration and {list(other.layers[name])} in the model"
            for name, shape in self.layers.items()
            if name in other.layers and other.layers[name] != shape
        ][:4]
        if not found and self.fingerprint and other.fingerprint and self.fingerprint != other.fingerprint:
            found.append("the weights differ (another training, or LoRAs baked in)")
        return found

    def require_match(self, other: ModelIdentity, what: str, other_weights: bool = False) -> None:
        """RequestError that says what differs. what: names the calibration. other_weights: a fine-tune is welcome."""
        compared = replace(self, fingerprint="") if other_weights else self
        problems = compared.problems(other)
        if problems:
            raise RequestError(
                f"{what} belongs to another model: {'; '.join(problems)}. Capture this model, or choose "
                "its own calibration."
            )


def fingerprint(weights: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """sha256 (hex) over the layers' names, shapes and first values, sorted by name.

    weights: (layer, shape, at least the first FINGERPRINT_VALUES values of its weight, flat, or all of them). Compared
    as bf16, so that a model in memory and its file agree whatever float type each has.
    """
    digest = hashlib.sha256()
    for layer, shape, values in sorted(weights, key=lambda entry: entry[0]):
        first = values.detach().reshape(-1)[:FINGERPRINT_VALUES].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{layer}:{list(shape)}:{first.tolist()};".encode())
    return digest.hexdigest()


def identity_of_source(source: Source, tensors: Mapping[str, str]) -> ModelIdentity:
    """Of an unquantized file. tensors: layer name -> tensor name; reads a few hundred bytes of each."""
    layers, entries = {}, []
    for layer, name in tensors.items():
        info = source.tensors[name]
        if len(info.shape) != 2 or info.dtype not in ("BF16", "F16", "F32"):
            raise RequestError(
                f"{name}: {info.dtype} of shape {list(info.shape)}; a linear layer's bf16, fp16 or fp32 "
                "weight is needed. Give the unquantized model."
            )
        layers[layer] = (info.shape[0], info.shape[1])
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[info.dtype]
        head = next(source.copy_chunks(name, FINGERPRINT_VALUES * dtype.itemsize))
        entries.append((layer, info.shape, torch.frombuffer(head, dtype=dtype)))
    return ModelIdentity(layers, fingerprint(entries))


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One sampling. steps: rows sampled by step id (of the layer that gave the most). sigmas: by step id, if known.

    labels: rows by label, summed over layers. completed: False after a cancel or an error. loras: active names.
    """

    note: str = ""
    completed: bool = False
    steps: Mapping[int, int] = field(default_factory=dict)
    sigmas: Mapping[int, float] = field(default_factory=dict)
    labels: Mapping[str, int] = field(default_factory=dict)
    loras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One row of the table that a user sees. channels: the largest (channel, absmax, absmax / rms), largest first."""

    layer: str
    in_features: int
    seen: int
    sampled: int
    nonfinite: int
    absmax: float
    p999: float
    rms: float
    hessian: str
    channels: tuple[tuple[int, float, float], ...]


@dataclass(slots=True)
class Calibration:
    """statistics: by layer, only layers that saw an input. seed, settings, weighting: how rows were chosen.

    calls: model calls kept whole, for replaying. Of a file that is open they are read when they are asked for.
    """

    model: ModelIdentity
    statistics: dict[str, LayerStatistics]
    runs: tuple[RunRecord, ...] = ()
    seed: int = 0
    settings: StatisticsSettings = StatisticsSettings()
    weighting: str = "uniform"
    pack_version: str = __version__
    calls: CallSample = field(default_factory=CallSample, compare=False)

    def require_captured(self) -> None:
        """RequestError when nothing was captured."""
        if not self.statistics:
            raise RequestError(
                "the calibration is empty: no layer saw an input. Run the sampler on the MODEL output of "
                "the capture node, and collect after it has finished."
            )

    def require_mergeable(self, other: Calibration) -> None:
        """RequestError when another capture is of another model, or chose or kept its rows otherwise."""
        other.model.require_match(self.model, "the second calibration")
        self.model.require_match(other.model, "the first calibration")
        if other.weighting != self.weighting:
            raise RequestError(
                f"one calibration weights its rows {self.weighting!r}, the other {other.weighting!r}; "
                "their sum would be neither. Capture both alike."
            )
        for name in ("reservoir_rows", "sketch_size"):
            one, two = getattr(self.settings, name), getattr(other.settings, name)
            if one != two:
                raise RequestError(f"{name} is {one} in one calibration and {two} in the other. Capture both alike.")

    def merge(self, other: Calibration) -> None:
        """Add another capture of the same model in place. RequestError when it does not fit; see require_mergeable."""
        self.require_mergeable(other)
        for layer, statistics in other.statistics.items():
            if layer in self.statistics:
                self.statistics[layer].merge(statistics, layer)
            else:
                self.statistics[layer] = statistics
        self.runs += other.runs
        self.calls.merge(other.calls)

    def table(self, channels: int = 3) -> list[LayerSummary]:
        """One summary per layer. channels: how many outlier channels to name. Raises Cancelled."""
        rows = []
        for layer, statistics in self.statistics.items():
            poll()
            rows.append(summarise(layer, statistics, channels))
        return rows


def summarise(layer: str, statistics: LayerStatistics, channels: int = 3) -> LayerSummary:
    """Waits for the GPU."""
    rms = float(statistics.mean_square().mean().sqrt())
    largest = statistics.absmax.topk(min(channels, statistics.in_features))
    named = tuple(
        (int(at), float(value), float(value) / rms if rms else 0.0)
        for value, at in zip(largest.values.tolist(), largest.indices.tolist(), strict=True)
    )
    return LayerSummary(
        layer,
        statistics.in_features,
        statistics.seen,
        int(statistics.count),
        int(statistics.nonfinite),
        float(statistics.absmax.max()),
        statistics.percentile(99.9),
        rms,
        statistics.kind.value,
        named,
    )
