"""From a source handle and settings to a quantized handle."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from comfy import model_management

from ...quant_core.checkpoint.part import remove
from ...quant_core.checkpoint.source import open_source
from ...quant_core.errors import QuantPressError, RequestError
from ...quant_core.pipeline.plan import linear_layers
from ...quant_core.pipeline.run import convert
from ...quant_core.policy.general import NOT_NAMED
from ...quant_core.stored.layers import stored_layers
from ...quant_core.tools.requantize import only_quantized
from ..shared.detection import Detection, detect, require_same
from ..shared.folders import stamp
from ..shared.handles import QuantizedHandle, SourceHandle, spool_of
from ..shared.progress import NodeProgress
from ..shared.recipe import Settings
from ..shared.spool import lora_path, spooled
from .in_order import live_model, require_fit

NOT_BEFORE = "not quantized before"


def quantize(
    source: SourceHandle, settings: Settings, progress: NodeProgress, maker: str = "Quantize Model", model: Any = None
) -> tuple[QuantizedHandle, dict[str, Any]]:
    """Quantize into a spool file, with the run's report; at once when this very file was made before and is still there.

    model: a ModelPatcher of the source, to quantize in order of execution; None otherwise.
    Raises QuantPressError, and ComfyUI's InterruptProcessingException after Cancel; neither leaves a file.
    """
    path = spool_of(source)

    def make(spool: Path) -> dict[str, Any]:
        progress.say("Reading the header")
        with open_source(path) as src:
            layers = linear_layers(src, stored_layers(src))
        return _convert(path, spool, settings.for_layers(layers), progress, detect(path, decoded=True), model)

    if model is not None and settings.calibration is None:
        raise RequestError(
            "Quantizing in order needs the calibration too: connect the one that was captured from this model, or "
            "disconnect the model."
        )
    if model is not None:
        require_fit(
            model, path, settings.calibration.path
        )  # also where the file is there already, from a model that fitted
    key = {"source": str(path), "stamp": stamp(path), **settings.describe(), "in_order": model is not None}
    spool, report = spooled(source.label, key, make)
    return QuantizedHandle(spool, source.label, maker, lora=lora_path(spool) if settings.residual else None), report


def requantize(
    quantized: QuantizedHandle, settings: Settings, progress: NodeProgress
) -> tuple[QuantizedHandle, dict[str, Any]]:
    """As `quantize`, for exactly the layers that are quantized now, unless the settings name others by `only`.

    The report gets "formats_before", {format: layers}.
    """
    path = spool_of(quantized)
    with open_source(path) as src:
        before, policy = only_quantized(src)
    chosen = settings.policy.only
    if not chosen:
        settings = replace(settings, policy=replace(settings.policy, only=policy.only))
    handle, report = quantize(SourceHandle(path, quantized.label, quantized.maker), settings, progress, "Requantize")
    rows = [
        row if chosen or row["format"] or row["reason"] != NOT_NAMED else {**row, "reason": NOT_BEFORE}
        for row in report["layers"]
    ]
    return handle, {**report, "layers": rows, "formats_before": before}


def _convert(
    source: Path, spool: Path, settings: Settings, progress: NodeProgress, detection: Detection, model: Any
) -> dict[str, Any]:
    device = torch.device(settings.device)
    if device.type != "cpu":
        # As for a sampler: models that fill the GPU move out, so that the largest layer fits.
        model_management.free_memory(model_management.minimum_inference_memory(), device)
    lora = lora_path(spool) if settings.residual else None
    if model is not None:
        progress.say("Running the recorded calls up to the first layer")
    try:
        with nullcontext() if model is None else live_model(model, settings.calibration.path) as live:
            report = convert(
                source,
                spool,
                settings.recipe,
                settings.policy,
                device=device,
                overwrite=True,
                never_pack=detection.fixed,
                calibration=settings.calibration,
                residual_lora=lora,
                live=live,
                progress=progress,
                cancel=progress.cancelled,
            )
        require_same(detection, spool)
    except QuantPressError:
        remove(lora_path(spool))
        raise
    finally:
        model_management.soft_empty_cache()
    warnings = list(report.warnings)
    if not detection.model:
        warnings.append("ComfyUI does not recognise this model: general rules decided, check the result.")
    if lora is not None and any(layer.judgement and layer.judgement.rounding == "gptq" for layer in report.quantized):
        warnings.append(
            "The residual LoRA stands on gptq, where it measured worse than none: take rounding nearest with it."
        )
    return {**report.to_json(), "architecture": detection.model, "warnings": warnings}
