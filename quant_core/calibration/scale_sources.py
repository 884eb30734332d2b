"""Where the input scales of a quantized file may come from: a calibration, a LoRA's directions, or random inputs."""
from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from ..cancel import poll
from ..checkpoint.layers import StoredLayer, stored_layers
from ..checkpoint.source import Source, open_source
from ..errors import RequestError
from .input_scales import rule_of, scale_for
from .layer_names import LayerNames
from .synthesise import SimulationSettings, index_lora_file, read_directions, simulated_magnitude
from .use import CalibrationUse, open_use

def captured_scales(source: Source, calibration: str | Path, percent: float = 100.0) -> dict[str, float]:
    """{layer of the file: input_scale} from a captured calibration, one layer in memory at a time.

    percent: 100 is the true absmax; see input_scales.scales_from_statistics. Raises RequestError (another model).
    """
    if not 0.0 < percent <= 100.0:
        raise RequestError(f"the percentile is {percent}; above 0 and up to 100 is needed.")
    stored, scales = stored_layers(source), {}
    with open_use(CalibrationUse(Path(calibration))) as known:
        known.require_match(source, _shapes(source, stored))
        for name, layer in stored.items():
            poll()
            rule = rule_of(layer)
            if rule is not None and known.has(name):
                scales[name] = scale_for(rule, known.magnitude(name, percent))
    return scales


def simulated_scales(source: Source, settings: SimulationSettings, lora: str | Path | None = None) -> tuple[dict[str, float], int]:
    """({layer of the file: input_scale}, how many of them from the LoRA): a guess, from each layer's own decoded weight.

    lora: its layers get inputs along its directions, all others random ones. Raises InputFileError.
    """
    stored, scales, informed = stored_layers(source), {}, 0
    with ExitStack() as stack:
        file = None if lora is None else stack.enter_context(open_source(lora))
        index = None if file is None else index_lora_file(file, LayerNames(stored))
        for name, layer in stored.items():
            poll()
            rule = rule_of(layer)
            if rule is None:
                continue
            directions = None if file is None else read_directions(file, index, name, layer.shape[1])
            informed += directions is not None
            scales[name] = scale_for(rule, simulated_magnitude(name, layer.decode(source), settings, directions))
    return scales, informed


def _shapes(source: Source, stored: Mapping[str, StoredLayer]) -> dict[str, tuple[int, int]]:
    """[N, K] of every linear layer, quantized or not."""
    plain = {name.removesuffix(".weight"): info.shape for name, info in source.tensors.items()
             if name.endswith(".weight") and len(info.shape) == 2}
    return {**plain, **{name: layer.shape for name, layer in stored.items()}}
