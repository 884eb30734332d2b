"""Starting a capture: the record and the model that fills it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy import model_management
from comfy.patcher_extension import WrappersMP

from ...quant_core.calibration.capture.budget import GIB, Budget
from ...quant_core.calibration.capture.collector import CaptureSettings
from ..shared.capture import Capture
from ..shared.model_state import COMPILE_KEY, KEY, compiled

ACCUMULATE, START_OVER = "accumulate", "start over"
CALLS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureInputs:
    """The node's inputs, by their names. calls: a saved workflow may lack it."""

    runs: str
    hessians: bool
    device_gb: float
    ram_gb: float
    rows_per_step: int
    layers: str
    seed: int
    calls: int = CALLS


def start_capture(model: Any, inputs: CaptureInputs) -> tuple[Any, Capture]:
    """As `watch`, from the node's inputs."""
    device = int(inputs.device_gb * GIB) or device_bytes()
    budget = Budget(device, int(inputs.ram_gb * GIB), hessians=inputs.hessians)
    settings = CaptureSettings(inputs.seed, inputs.rows_per_step)
    return watch(model, inputs.layers.strip(), budget, settings, inputs.calls, inputs.runs == ACCUMULATE)


def watch(
    model: Any, pattern: str, budget: Budget, settings: CaptureSettings, calls: int, accumulate: bool
) -> tuple[Any, Capture]:
    """(a clone of the ModelPatcher that fills the capture when it is sampled, the capture).

    RequestError: the model is compiled.
    """
    if model.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY):
        raise compiled()
    capture, watched = Capture(model, pattern, budget, settings, calls, accumulate), model.clone()
    watched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, capture.outer_sample)
    watched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, capture.prepare_sampling)
    watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, capture.predict_noise)
    # Before those of other nodes: what they do to a call, they do to a replay as well.
    others = watched.wrappers.pop(WrappersMP.APPLY_MODEL, {})
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, capture.apply_model)
    for key, wrappers in others.items():
        watched.wrappers[WrappersMP.APPLY_MODEL].setdefault(key, []).extend(wrappers)
    return watched, capture


def device_bytes() -> int:
    """What a capture may take when nothing is said: a quarter of the GPU's memory.

    Without a GPU it is the engine's default.
    """
    device = model_management.get_torch_device()
    return Budget().device_bytes if device.type == "cpu" else model_management.get_total_memory(device) // 4
