"""Input scales into the file of a handle: where they are from, and the table of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...quant_core.checkpoint.source import Source
from ...quant_core.errors import RequestError, counted, some_of
from ...quant_core.input_scales.rule import file_input_scales, read_input_scales, scales_from_weight_scales
from ...quant_core.input_scales.sources import captured_saturation, captured_scales, simulated_scales
from ...quant_core.input_scales.synthesise import SimulationSettings
from ...quant_core.names.layer_names import LayerNames
from ...quant_core.stored.layers import stored_layers
from ...quant_core.tools.input_scales import PatchReport, plan_patch
from ..shared.folders import CALIBRATIONS, LORAS, SOURCE_FOLDERS, list_models, resolve_model, stamp
from ..shared.handles import CalibrationHandle, spool_of
from ..shared.progress import NodeProgress
from ..shared.run_tool import Proposal

NAME = "Calibrate Input Scales"
NONE = "none"
SIMULATED, LORA, CAPTURED, FILE, WEIGHTS = METHODS = ("simulated", "LoRA", "calibration", "file", "weight scales")
_JSON = (".json",)
_SHOWN, _WARNED = 24, 8


def scale_files() -> list[str]:
    """Model files, which may have input scales, and JSON files in models/calibrations."""
    return [NONE, *list_models(CALIBRATIONS, shards=False, suffixes=_JSON), *list_models(*SOURCE_FOLDERS)]


def scale_file(name: str) -> Path | None:
    if name == NONE:
        return None
    return (
        resolve_model(name, CALIBRATIONS, suffixes=_JSON)
        if name.startswith(f"{CALIBRATIONS}/")
        else resolve_model(name, *SOURCE_FOLDERS)
    )


def lora_file(name: str) -> Path | None:
    return None if name == NONE else resolve_model(name, LORAS)


@dataclass(frozen=True, slots=True)
class ScaleSettings:
    """The inputs that the method uses, with paths in place of names. calibration: given with any method.

    RequestError when the method's own input is missing.
    """

    method: str
    simulation: SimulationSettings
    captured_percentile: float
    lora: Path | None
    file: Path | None
    calibration: Path | None

    def __post_init__(self) -> None:
        if self.method == LORA and self.lora is None:
            raise RequestError("The method LoRA needs a file in `lora`: choose one from models/loras.")
        if self.method == FILE and self.file is None:
            raise RequestError(
                "The method file needs a file in `file`: a quantized model with input scales, or a JSON object "
                "{layer: number} in models/calibrations."
            )
        if self.method == CAPTURED and self.calibration is None:
            raise RequestError("The method calibration needs one: connect Collect Calibration or Load Calibration.")

    @property
    def reads(self) -> tuple[Path, ...]:
        """The user's files that the scales are from."""
        return tuple(path for path in (self.lora, self.file) if path is not None)

    def describe(self) -> dict[str, Any]:
        paths = {
            name: None if path is None else [str(path), stamp(path)]
            for name, path in (("lora", self.lora), ("file", self.file), ("calibration", self.calibration))
        }
        return {
            "method": self.method,
            "simulation": asdict(self.simulation),
            "percentile": self.captured_percentile,
            **paths,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleInputs:
    """The node's inputs, by their names."""

    method: str
    samples: int
    percentile: float
    seed: int
    captured_percentile: float
    lora: str
    file: str
    calibration: CalibrationHandle | None = None


def read_settings(values: ScaleInputs) -> ScaleSettings:
    """Only what the method uses, so that changing another widget makes no new file. The calibration always warns."""
    method, simulation = values.method, SimulationSettings()
    if method in (SIMULATED, LORA):
        simulation = SimulationSettings(values.samples, values.percentile, values.seed)
    return ScaleSettings(
        method,
        simulation,
        values.captured_percentile if method == CAPTURED else 100.0,
        lora_file(values.lora) if method == LORA else None,
        scale_file(values.file) if method == FILE else None,
        None if values.calibration is None else spool_of(values.calibration),
    )


def plan(src: Source, settings: ScaleSettings, progress: NodeProgress) -> Proposal:
    """Plan.data: {method, scales, added, changed, kept, skipped, notes, saturated}. Raises QuantPressError."""
    given, method = _scales(src, settings, progress)
    layers = stored_layers(src)
    rewrite, report = plan_patch(src, given, method)
    names = LayerNames(layers)
    resolved = {name: names.resolve(name) for name in given if name not in report.skipped}
    scales = {layer: given[name] for name, layer in resolved.items() if layer is not None}
    # Scales from the largest captured inputs let all of them through.
    all_fit = settings.method == CAPTURED and settings.captured_percentile == 100
    saturated = []
    if settings.calibration is not None and not all_fit:
        saturated = captured_saturation(src, settings.calibration, scales, progress)
    data = {
        "method": method,
        "scales": scales,
        "saturated": saturated,
        **{field.name: _plain(getattr(report, field.name)) for field in fields(report)},
    }
    return Proposal(rewrite, _table(method, scales, file_input_scales(src, layers), report, saturated), data)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value)


def _scales(src: Source, settings: ScaleSettings, progress: NodeProgress) -> tuple[dict[str, float], str]:
    """({layer: input_scale}, where they are from)."""
    if settings.method == CAPTURED and settings.calibration is not None:
        percent = settings.captured_percentile
        return (
            captured_scales(src, settings.calibration, percent, progress),
            "calibration" + ("" if percent == 100 else f", percentile {percent:g}"),
        )
    if settings.file is not None:
        return read_input_scales(settings.file), f"file {settings.file.name}"
    if settings.method == WEIGHTS:
        return scales_from_weight_scales(src, stored_layers(src)), "the weight scales"
    scales, informed = simulated_scales(src, settings.simulation, settings.lora, progress)
    random = f"{settings.simulation.samples} random inputs, percentile {settings.simulation.percentile:g}"
    if settings.lora is None:
        return scales, random
    return scales, f"LoRA {settings.lora.name} for {counted(informed, 'layer')}, {random} for {len(scales) - informed}"


def _table(
    method: str, scales: Mapping[str, float], before: Mapping[str, float], report: PatchReport, saturated: list[str]
) -> list[str]:
    lines = [
        f"input scales from {method}: {len(report.added)} added, {len(report.changed)} changed, {len(report.kept)} as "
        "they were"
    ]
    if report.skipped:
        why = [f"{name} ({reason})" for name, reason in report.skipped.items()]
        lines.append(f"skipped {len(why)}: {some_of(why, shown=3)}")
    lines += [f"warning: {text}" for text in saturated[:_WARNED]]
    lines += (
        [f"warning: {counted(len(saturated) - _WARNED, 'more layer saturates', 'more layers saturate')}"]
        if len(saturated) > _WARNED
        else []
    )
    lines += [f"note: {note}" for note in report.notes[:3]]
    rows = sorted(scales.items(), key=lambda item: -item[1])
    lines += [
        f"  {layer}: {f'{before[layer]:.4g} -> ' if layer in before else ''}{value:.4g}"
        for layer, value in rows[:_SHOWN]
    ]
    return lines + ([f"  and {len(rows) - _SHOWN} smaller ones (all in the JSON)"] if len(rows) > _SHOWN else [])
