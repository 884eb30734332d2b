"""From a source handle and settings to a quantized handle."""
from __future__ import annotations

import json
from typing import Any

import torch
from comfy import model_management

from ..quant_core._version import __version__
from ..quant_core.errors import Cancelled, QuantPressError
from ..quant_core.run import convert
from ._detection import Detection, detect, require_same
from ._folders import stamp
from ._handles import QuantizedHandle, SourceHandle
from ._progress import NodeProgress
from ._recipe import Settings
from ._spool import finished_report, report_path, spool_path, sweep
from ..quant_core.checkpoint.part import remove


def quantize(source: SourceHandle, settings: Settings, progress: NodeProgress) -> QuantizedHandle:
    """Quantize into a spool file; at once when this very file was made before and is still there.

    Raises QuantPressError, and ComfyUI's InterruptProcessingException after Cancel; neither leaves a file.
    """
    key = {"version": __version__, "source": str(source.path), "stamp": stamp(source.path), **settings.describe()}
    spool = spool_path(source.label, key)
    report = finished_report(spool)
    if report is None:
        sweep()
        progress.say("Reading the header")
        report = _convert(source, spool, settings, progress, detect(source.path))
        report_path(spool).write_text(json.dumps(report), "utf-8")
    return QuantizedHandle(spool, source.label, report)


def _convert(source: SourceHandle, spool: Any, settings: Settings, progress: NodeProgress,
             detection: Detection) -> dict[str, Any]:
    device = torch.device(settings.device)
    if device.type != "cpu":
        # As for a sampler: models that fill the GPU move out, so that the largest layer fits.
        model_management.free_memory(model_management.minimum_inference_memory(), device)
    try:
        # ComfyUI executes nodes in inference mode, where the rounders that learn could not differentiate.
        with torch.inference_mode(False):
            report = convert(source.path, spool, settings.recipe, settings.policy, device=device, overwrite=True,
                             never_pack=detection.fixed, calibration=settings.calibration,
                             progress=progress, cancel=progress.cancelled)
        require_same(detection, spool)
    except Cancelled:
        model_management.throw_exception_if_processing_interrupted()
        raise
    except QuantPressError:
        remove(spool)
        raise
    finally:
        model_management.soft_empty_cache()
    unknown = () if detection.model else ("ComfyUI does not recognise this model: general rules decided, check the result.",)
    return {**report.to_json(), "architecture": detection.model, "warnings": [*report.warnings, *unknown]}
