"""Where the input scales of a quantized file may come from: a calibration, a LoRA's directions, or random inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from ..calibration.use import CalibrationUse, open_use
from ..cancel import poll
from ..checkpoint.source import Source, open_source
from ..errors import RequestError
from ..names.layer_names import LayerNames
from ..progress import Clock, Progress
from ..stored.layers import StoredLayer, stored_layers
from .rule import file_input_scales, rule_of, saturation_of
from .synthesise import SimulationSettings, index_lora_file, read_directions, simulated_magnitude


def captured_scales(
    source: Source, calibration: str | Path, percent: float = 100.0, progress: Callable[[Progress], None] | None = None
) -> dict[str, float]:
    """{layer of the file: input_scale} from a captured calibration, one layer in memory at a time.

    percent: 100 is the true absmax; see input_scales.scales_from_statistics. Raises RequestError (another model).
    """
    if not 0.0 < percent <= 100.0:
        raise RequestError(f"the percentile is {percent}; above 0 and up to 100 is needed.")
    stored, scales = stored_layers(source), {}
    with open_use(CalibrationUse(Path(calibration))) as known:
        known.require_match(source, _shapes(source, stored))
        for name, layer in _polled(stored, source, progress):
            rule = rule_of(layer)
            if rule is not None and known.has(name):
                scales[name] = rule.scale_for(known.magnitude(name, percent))
    return scales


def captured_saturation(
    source: Source,
    calibration: str | Path,
    scales: Mapping[str, float],
    progress: Callable[[Progress], None] | None = None,
) -> list[str]:
    """One sentence per layer whose captured inputs saturate.

    They are held against these scales, or against the file's own where none is given.
    scales: {layer of the file: input_scale}. Raises RequestError (another model).
    """
    stored, found = stored_layers(source), []
    effective = {**file_input_scales(source, stored), **scales}
    with open_use(CalibrationUse(Path(calibration))) as known:
        known.require_match(source, _shapes(source, stored))
        for name, layer in _polled(stored, source, progress):
            if rule_of(layer) is not None and known.has(name):
                found += saturation_of(layer, known.magnitude(name, 100.0), effective.get(name))
    return found


def simulated_scales(
    source: Source,
    settings: SimulationSettings,
    lora: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[dict[str, float], int]:
    """({layer of the file: input_scale}, how many of them from the LoRA).

    A guess, from each layer's own decoded weight.
    lora: its layers get inputs along its directions, all others random ones. Raises InputFileError.
    """
    stored, scales, informed = stored_layers(source), {}, 0
    with ExitStack() as stack:
        file = None if lora is None else stack.enter_context(open_source(lora))
        index = None if file is None else index_lora_file(file, LayerNames(stored))
        for name, layer in _polled(stored, source, progress):
            rule = rule_of(layer)
            if rule is None:
                continue
            directions = None if file is None or index is None else read_directions(file, index, name, layer.shape[1])
            informed += directions is not None
            scales[name] = rule.scale_for(simulated_magnitude(name, layer.decode(source), settings, directions))
    return scales, informed


def _polled(
    stored: Mapping[str, StoredLayer], source: Source, progress: Callable[[Progress], None] | None
) -> Iterator[tuple[str, StoredLayer]]:
    """The layers, with cancelling and progress between them; bytes are those of the layers' tensors."""
    sizes = {
        name: sum(source.tensors[tensor].nbytes for tensor in layer.names.values()) for name, layer in stored.items()
    }
    clock = Clock(len(stored), sum(sizes.values()))
    for name, layer in stored.items():
        poll()
        yield name, layer
        state = clock.advance(name, sizes[name])
        if progress is not None:
            progress(state)


def _shapes(source: Source, stored: Mapping[str, StoredLayer]) -> dict[str, tuple[int, int]]:
    """[N, K] of every linear layer, quantized or not."""
    plain = {
        name.removesuffix(".weight"): info.shape
        for name, info in source.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
    return {**plain, **{name: layer.shape for name, layer in stored.items()}}
