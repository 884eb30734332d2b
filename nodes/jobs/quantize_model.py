"""From a source handle and settings to a quantized handle."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from comfy import model_management

from ...quant_core.checkpoint.part import remove
from ...quant_core.errors import QuantPressError
from ...quant_core.pipeline.in_order.jobs import LiveModel
from ...quant_core.pipeline.request import Request
from ...quant_core.pipeline.run import convert
from ...quant_core.policy.general import NOT_NAMED
from ...quant_core.tools.requantize import only_quantized
from ..shared.detection import detect, require_same
from ..shared.folders import stamp
from ..shared.handles import QuantizedHandle, SourceHandle, origins_of, spool_of
from ..shared.progress import NodeProgress
from ..shared.recipe import NO_PRESET, Settings
from ..shared.spool import lora_path, spool_path, spooled
from ..shared.wording import in_inputs
from .in_order import live_model, require_fit

NOT_BEFORE = "not quantized before"


def quantize(
    source: SourceHandle, settings: Settings, progress: NodeProgress, maker: str = "Quantize Model", model: Any = None
) -> tuple[QuantizedHandle, dict[str, Any]]:
    """Quantize into a spool file, with the run's report; at once when this very file is there from an earlier run.

    model: a ModelPatcher of the source, to quantize in order of execution; None otherwise.
    Raises QuantPressError, and ComfyUI's InterruptProcessingException after Cancel; neither leaves a file.
    """
    path = spool_of(source)
    key = {"source": str(path), "stamp": stamp(path), **settings.describe(), "in_order": model is not None}
    request = _request(path, spool_path(source.label, key), settings, in_order=model is not None)
    if model is not None and request.calibration is not None:  # a Request in order always has one
        # Also where the file is there already, made from a model that fitted.
        require_fit(model, path, request.calibration.path)
    spool, report = spooled(source.label, key, lambda _: _convert(request, progress, model))
    origins = origins_of(source)
    return QuantizedHandle(spool, source.label, maker, lora=request.residual_lora, origins=origins), report


def requantize(
    quantized: QuantizedHandle, settings: Settings, progress: NodeProgress
) -> tuple[QuantizedHandle, dict[str, Any]]:
    """As `quantize`, for exactly the layers that are quantized now, unless the settings name others by `only`.

    The report gets "formats_before", {format: layers}.
    """
    path, chosen = spool_of(quantized), settings.policy.only
    before, policy = only_quantized(path, settings.policy)
    source = SourceHandle(path, quantized.label, quantized.maker, quantized.origins)
    handle, report = quantize(source, replace(settings, policy=policy), progress, "Requantize")
    rows = [
        row if chosen or row["format"] or row["reason"] != NOT_NAMED else {**row, "reason": NOT_BEFORE}
        for row in report["layers"]
    ]
    return handle, {**report, "layers": rows, "formats_before": before}


def _request(source: Path, spool: Path, settings: Settings, in_order: bool) -> Request:
    return Request(
        source,
        spool,
        settings.recipe,
        settings.policy,
        device=settings.device,
        calibration=settings.calibration,
        residual_lora=lora_path(spool) if settings.residual else None,
        overwrite=True,
        preset=None if settings.preset == NO_PRESET else settings.preset,
        in_order=in_order,
    )


def _live(request: Request, model: Any) -> AbstractContextManager[LiveModel | None]:
    """None where the layers are not quantized in order."""
    if model is None or request.calibration is None:
        return nullcontext()
    return live_model(model, request.calibration.path)


def _convert(request: Request, progress: NodeProgress, model: Any) -> dict[str, Any]:
    progress.say("Reading the header")
    detection = detect(request.source, decoded=True)
    device = torch.device(request.device)
    if device.type != "cpu":
        # As for a sampler: models that fill the GPU move out, so that the largest layer fits.
        model_management.free_memory(model_management.minimum_inference_memory(), device)
    if model is not None:
        progress.say("Running the recorded calls up to the first layer")
    try:
        with _live(request, model) as live:
            report = convert(
                replace(request, never_pack=detection.fixed), live=live, progress=progress, cancel=progress.cancelled
            )
        require_same(detection, request.target)
    except QuantPressError:
        remove(lora_path(request.target))
        raise
    finally:
        model_management.soft_empty_cache()
    warnings = [in_inputs(warning, ("input_scales",)) for warning in report.warnings]
    if not detection.model:
        warnings.append("This ComfyUI does not recognise the model and cannot load it: a newer one may.")
    return {**report.to_json(), "architecture": detection.model, "warnings": warnings}
