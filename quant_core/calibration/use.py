"""A calibration at work in a conversion: matched with the file's layers, and read one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algorithms.evidence import Evidence
from ..checkpoint.source import Source, open_source
from ..errors import Problem, Remedy
from ..formats.base import Format
from ..formats.input_scale import Absent, InputScaleRule
from ..names.layer_names import LayerNames
from .calibration import ModelIdentity, identity_of_source
from .evidence import to_evidence
from .statistics.hessian import HessianKind
from .storage import CalibrationReader

_FLOATS = ("F32", "F16", "BF16")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class CalibrationUse:
    """path: the calibration's file. bias_correction: move the mean output error into the bias, where that helps on
    held-out rows. input_scales: write `input_scale` from the true absmax for the formats whose runtime uses it.
    """

    path: Path
    bias_correction: bool = False
    input_scales: bool = False


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a calibration gives one layer. evidence: on the CPU. input_scale: float32 (), None when none is written."""

    evidence: Evidence
    input_scale: Tensor | None = None


class OpenCalibration:
    """An open calibration and how it is used. Made by open_use; `require_match` comes before everything else."""

    def __init__(self, reader: CalibrationReader, source: Source, use: CalibrationUse) -> None:
        self.use = use
        self._reader, self._source = reader, source
        self._captured = frozenset(reader.layers)
        self._names = LayerNames(reader.header.model.layers)
        self._saturated: dict[str, tuple[float, float]] = {}

    def require_match(self, src: Source, shapes: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
        """RequestError when it belongs to another model. Returns warnings: other weights, layers without data.

        shapes: [N, K] of the file's linear layers. A layer of the calibration may be several of the file (the parts of
        a joined projection, in files with the names of diffusers): their N add up.
        """
        parts: dict[str, list[str]] = {}
        for layer in shapes:
            known = self._names.resolve(layer)
            if known is not None:
                parts.setdefault(known, []).append(layer)
        model, what = self._reader.header.model, self._source.path.name
        found = ModelIdentity(
            {
                name: (sum(shapes[layer][0] for layer in layers), _width(layers, shapes, model.layers[name][1]))
                for name, layers in parts.items()
            }
        )
        model.require_match(found, what, other_weights=True)
        tensors = {name: f"{layers[0]}.weight" for name, layers in parts.items() if name in model.layers}
        comparable = model.fingerprint and all(
            len(parts[name]) == 1 and src.tensors[tensor].dtype in _FLOATS for name, tensor in tensors.items()
        )
        if not comparable:
            return ()
        captured = identity_of_source(src, tensors)
        return (
            ()
            if captured.fingerprint == model.fingerprint
            else (
                f"{what} was captured from a model with other weights (another training, or LoRAs baked in): it fits "
                "as far as the inputs are alike.",
            )
        )

    def has(self, layer: str) -> bool:
        """Whether this layer of the file was captured."""
        return self._names.resolve(layer) in self._captured

    def known_as(self, layer: str) -> str | None:
        """The model's own name of a layer of the file; None when the model has none such."""
        return self._names.resolve(layer)

    def hessian_bytes(self, layer: str) -> int:
        """Of the layer's Hessian in float32; 0 where there is none."""
        name = self._names.resolve(layer)
        if name not in self._captured or self._reader.kind(name) is HessianKind.DIAGONAL:
            return 0
        return self._reader.header.model.layers[name][1] ** 2 * 4

    def writes_input_scale(self, layer: str, fmt: Format, config: Mapping[str, Any]) -> bool:
        return self.use.input_scales and self.has(layer) and fmt.input_scale_rule(config) is not None

    def read(self, layer: str, fmt: Format, config: Mapping[str, Any], hessian: bool = True) -> LayerInputs:
        """Everything known of one layer; nothing of it is kept here. hessian: False leaves the largest part out."""
        name = self._names.resolve(layer)
        if name not in self._captured:
            return LayerInputs(Evidence())
        statistics = self._reader.statistics(name)
        evidence = to_evidence(statistics, "cpu", hessian)
        rule = fmt.input_scale_rule(config)
        if rule is None or evidence.absmax is None:
            return LayerInputs(evidence)
        largest = float(evidence.absmax.max())
        if not self.use.input_scales:
            self._note_saturation(layer, rule, largest)
            return LayerInputs(evidence)
        return LayerInputs(evidence, torch.tensor(rule.scale_for(largest), dtype=torch.float32, device="cpu"))

    def magnitude(self, layer: str, percent: float) -> float:
        """The percentile of |x| of a captured layer; 100 is the true largest. KeyError: it was not captured."""
        name = self._names.resolve(layer)
        if name is None:
            raise KeyError(layer)
        return self._reader.statistics(name).percentile(percent)

    def _note_saturation(self, layer: str, rule: InputScaleRule, largest: float) -> None:
        if rule.absent is Absent.ONE and largest > rule.largest:
            self._saturated[layer] = (largest, rule.largest)

    def warnings(self) -> tuple[Problem, ...]:
        """What the layers read so far showed: inputs that saturate for want of an input_scale."""
        if not self._saturated:
            return ()
        worst = sorted(self._saturated.items(), key=lambda item: -item[1][0])[:_SHOWN]
        named = ", ".join(f"{layer} ({largest:.4g})" for layer, (largest, _) in worst)
        text = (
            f"the inputs of {len(self._saturated)} layers go beyond {worst[0][1][1]:.4g}, where ComfyUI's FP8 "
            f"multiplication saturates them without an input_scale: {named}."
        )
        return (Problem(text, "input_scales", Remedy.WRITE),)

    def describe(self, layers: int, in_order: bool) -> dict[str, Any]:
        """JSON object for the file's header. layers: how many of the quantized ones were captured.

        in_order: they are quantized in order of execution, beside the running model (pipeline/in_order).
        """
        header = self._reader.header
        return {
            "file": self._source.path.name,
            "hash": self._source.identity_hash(),
            "runs": len(header.runs),
            "layers": layers,
            "bias_correction": self.use.bias_correction,
            "input_scales": self.use.input_scales,
            "in_order": in_order,
        }


def _width(layers: Sequence[str], shapes: Mapping[str, tuple[int, int]], wanted: int) -> int:
    """K of the first of the parts that differs from what is wanted, else that."""
    return next((shapes[layer][1] for layer in layers if shapes[layer][1] != wanted), wanted)


@contextmanager
def open_use(use: CalibrationUse) -> Iterator[OpenCalibration]:
    """Raises InputFileError: not there, or no calibration."""
    with open_source(use.path) as source:
        yield OpenCalibration(CalibrationReader(source), source, use)


def on_device(evidence: Evidence, device: torch.device) -> Evidence:
    """The same evidence with its tensors there, but for the Hessian.

    quantize_layer moves the Hessian itself, and then owns the copy.
    """
    moved = {field: getattr(evidence, field) for field in ("hessian_diagonal", "mean", "absmax", "rows")}
    return replace(evidence, **{field: tensor.to(device) for field, tensor in moved.items() if tensor is not None})
