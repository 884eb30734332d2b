"""From a source handle and settings to a quantized handle."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from comfy import model_management

from ..quant_core.run import convert
from ._detection import Detection, detect, require_same
from ._folders import stamp
from ._handles import QuantizedHandle, SourceHandle
from ._progress import NodeProgress
from ._recipe import Settings
from ._spool import spooled


def quantize(source: SourceHandle, settings: Settings, progress: NodeProgress) -> tuple[QuantizedHandle, dict[str, Any]]:
    """Quantize into a spool file, with the run's report; at once when this very file was made before and is still there.

    Raises QuantPressError, and ComfyUI's InterruptProcessingException after Cancel; neither leaves a file.
    """
    def make(spool: Path) -> dict[str, Any]:
        progress.say("Reading the header")
        return _convert(source, spool, settings, progress, detect(source.path))

    key = {"source": str(source.path), "stamp": stamp(source.path), **settings.describe()}
    spool, report = spooled(source.label, key, make)
    return QuantizedHandle(spool, source.label), report


def _convert(source: SourceHandle, spool: Path, settings: Settings, progress: NodeProgress,
             detection: Detection) -> dict[str, Any]:
    device = torch.device(settings.device)
    if device.type != "cpu":
        # As for a sampler: models that fill the GPU move out, so that the largest layer fits.
        model_management.free_memory(model_management.minimum_inference_memory(), device)
    try:
        report = convert(source.path, spool, settings.recipe, settings.policy, device=device, overwrite=True,
                         never_pack=detection.fixed, calibration=settings.calibration,
                         progress=progress, cancel=progress.cancelled)
        require_same(detection, spool)
    finally:
        model_management.soft_empty_cache()
    unknown = () if detection.model else ("ComfyUI does not recognise this model: general rules decided, check the result.",)
    return {**report.to_json(), "architecture": detection.model, "warnings": [*report.warnings, *unknown]}
