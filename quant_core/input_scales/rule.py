"""`input_scale`: by what a runtime divides a layer's inputs before it quantizes them. Chosen and read here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from ..calibration.statistics.layer import LayerStatistics
from ..checkpoint.source import Source, open_source
from ..checkpoint.suffixes import INDEX_SUFFIX, has_suffix
from ..errors import InputFileError, RequestError, some_of
from ..formats.input_scale import Absent, InputScaleRule
from ..names.layer_names import LayerNames
from ..stored.layers import StoredLayer

SUFFIXES = (".input_scale", ".scale_input")  # the second in legacy fp8_scaled files


def rule_of(layer: StoredLayer) -> InputScaleRule | None:
    """None when the layer's runtime ignores input_scale: another format, or full_precision_matrix_mult."""
    return layer.format.input_scale_rule(layer.config)


def scales_from_statistics(
    layers: Mapping[str, StoredLayer], statistics: Mapping[str, LayerStatistics], percent: float = 100.0
) -> dict[str, float]:
    """{layer of the file: input_scale} for every layer that uses one and was captured.

    percent: 100 is the true absmax, the default for a reason: what lies above a percentile saturates, and clipped
    outliers cost more than finer steps for the rest gain (bench/calibration/activations.py).
    """
    if not 0.0 < percent <= 100.0:
        raise RequestError(f"percent is {percent}; above 0 and up to 100 is needed.")
    return scales_from_magnitudes(layers, {name: found.percentile(percent) for name, found in statistics.items()})


def scales_from_magnitudes(layers: Mapping[str, StoredLayer], magnitudes: Mapping[str, float]) -> dict[str, float]:
    """{layer of the file: input_scale}. magnitudes: the largest input to represent, by any name of a layer."""
    names, scales = LayerNames(layers), {}
    for name, magnitude in magnitudes.items():
        layer = names.resolve(name)
        if layer is None:
            continue
        rule = rule_of(layers[layer])
        if rule is not None:
            scales[layer] = rule.scale_for(magnitude)
    return scales


def scales_from_weight_scales(source: Source, layers: Mapping[str, StoredLayer]) -> dict[str, float]:
    """input_scale = weight_scale, for FP8 layers with one scale: what the older tool's text-encoder presets write."""
    scales = {}
    for name, layer in layers.items():
        rule = rule_of(layer)
        stored = layer.names.get("weight_scale")
        if rule is not None and rule.absent is Absent.ONE and stored and math.prod(source.tensors[stored].shape) == 1:
            scales[name] = float(source.read(stored).float())
    return scales


def read_input_scales(path: str | Path) -> dict[str, float]:
    """{layer: input_scale} from a JSON object of numbers, or from any safetensors file that has such tensors.

    Raises InputFileError: not readable, no scale in it, or a value that is not a finite number above 0.
    """
    path = Path(path)
    found = (
        _from_json(path)
        if path.suffix.lower() == ".json" and not has_suffix(path.name, INDEX_SUFFIX)
        else _from_tensors(path)
    )
    if not found:
        raise InputFileError(
            f"{path}: it holds no input scale. Give a JSON object {{layer: number}}, or a quantized model "
            "with .input_scale tensors."
        )
    for layer, value in found.items():
        if not math.isfinite(value) or value <= 0:
            raise InputFileError(
                f"{path}: {layer} has the input scale {value}; a finite number above 0 is needed. "
                "Correct it, or leave the layer out."
            )
    return found


def _from_json(path: Path) -> dict[str, float]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise InputFileError(
            f"{path}: the file cannot be read as JSON: {err}. Give an object {{layer: number}}."
        ) from err
    if not isinstance(content, dict):
        raise InputFileError(
            f"{path}: a JSON {type(content).__name__} was found; an object {{layer: number}} is needed."
        )
    wrong = [
        layer for layer, value in content.items() if isinstance(value, bool) or not isinstance(value, (int, float))
    ]
    if wrong:
        raise InputFileError(f"{path}: {some_of(wrong, shown=3)}: a number is needed. Correct the file.")
    return {_without_suffix(layer): float(value) for layer, value in content.items()}


def _from_tensors(path: Path) -> dict[str, float]:
    found = {}
    with open_source(path) as source:
        for name, info in source.tensors.items():
            if not name.endswith(SUFFIXES):
                continue
            if math.prod(info.shape) != 1:
                raise InputFileError(f"{path}: {name} has shape {list(info.shape)}; one number is needed.")
            found[_without_suffix(name)] = float(source.read(name).float())
    return found


def _without_suffix(name: str) -> str:
    for suffix in (*SUFFIXES, ".weight"):
        name = name.removesuffix(suffix)
    return name


def saturation_of(layer: StoredLayer, largest: float, scale: float | None) -> list[str]:
    """The sentence for one layer whose inputs reach `largest`; [] where nothing saturates.

    scale: None where it has none.
    """
    rule = rule_of(layer)
    if rule is None or (scale is None and rule.absent is Absent.DYNAMIC):
        return []
    limit = rule.largest * (1.0 if scale is None else scale)
    # A scale chosen from this very absmax may round a hair below it.
    if largest <= limit * (1 + 1e-6):
        return []
    which = "no input_scale" if scale is None else f"its input_scale {scale:.6g}"
    return [
        f"{layer.layer}: inputs reach {largest:.4g}, and {which} saturates them above {limit:.4g}; write an "
        f"input_scale of {rule.scale_for(largest):.4g}."
    ]


def file_input_scales(source: Source, layers: Mapping[str, StoredLayer]) -> dict[str, float]:
    """{layer: input_scale} of the layers that have one in the file."""
    return {
        name: float(source.read(layer.names["input_scale"]).float())
        for name, layer in layers.items()
        if "input_scale" in layer.names and math.prod(source.tensors[layer.names["input_scale"]].shape) == 1
    }
