"""The running model beside a conversion: for quantizing in order of execution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from comfy import model_management

from ...quant_core.calibration.calibration import ModelIdentity, identity_of_source
from ...quant_core.calibration.calls import KeptCall
from ...quant_core.calibration.capture.linear_modules import linear_modules, shape_of
from ...quant_core.calibration.storage import open_calibration
from ...quant_core.checkpoint.source import open_source
from ...quant_core.errors import RequestError
from ...quant_core.names.layer_names import LayerNames
from ...quant_core.pipeline.in_order.jobs import LiveModel, room
from ..shared.model_state import model_fingerprint
from .replay import call_bytes, loaded, replay, replayable

_SHARE = 2  # of the device's memory, that the waiting calls may take


def require_fit(model: Any, source: Path, calibration: Path) -> None:
    """RequestError: the model does not fit the file that is quantized, or not the calibration.

    A model fits if it shows its own inputs (see replayable) and has the weights of that file.
    """
    replayable(model)
    layers = linear_modules(model.get_model_object("diffusion_model"))
    with open_calibration(calibration) as reader:
        known = reader.header.model
    require_same_weights(model, {name: module for name, module in layers.items() if name in known.layers}, source)
    connected = ModelIdentity({name: shape_of(module) for name, module in layers.items()})
    known.require_match(connected, calibration.name, other_weights=True)


@contextmanager
def live_model(model: Any, calibration: Path) -> Iterator[LiveModel]:
    """A ModelPatcher that fits, loaded, with the calls that the calibration holds. RequestError: there are too few."""
    with open_calibration(calibration) as reader:
        kept, known = reader.header.calls.kept, reader.header.model
        layers = linear_modules(model.get_model_object("diffusion_model"))
        modules = {name: module for name, module in layers.items() if name in known.layers}
        live = LiveModel(modules, [partial(_run, model, call) for call in kept], [call.group for call in kept])
        one = max(call_bytes(model, {path: shape for path, (_, shape) in call.tensors.items()}) for call in kept)
        with loaded(model, one) as (_, device):
            found = room(live, model_management.get_total_memory(device) // _SHARE)
        with loaded(model, one + found.nbytes):
            yield replace(live, most_calls=found.calls)


def require_same_weights(model: Any, modules: dict[str, Any], source: Path) -> None:
    """RequestError unless the model's layers hold the file's weights."""
    names = LayerNames(modules)
    with open_source(source) as src:
        resolved = {
            names.resolve(tensor.removesuffix(".weight")): tensor
            for tensor in src.tensors
            if tensor.endswith(".weight")
        }
        tensors = {name: resolved[name] for name in modules if name in resolved}
        found = identity_of_source(src, tensors).fingerprint
    if found != model_fingerprint(model, {name: modules[name] for name in tensors}):
        raise RequestError(
            f"The model that is connected has other weights than {source.name}. Connect the model that ComfyUI loads "
            "from the very file that is quantized, or none."
        )


def _run(model: Any, call: KeptCall) -> None:
    replay(model, call.call(), model.load_device)
