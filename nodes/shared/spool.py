"""Spool files: quantized models that are not saved (yet), in ComfyUI's temporary folder.

A model goes through a file even when it is only to be run: memory stays bounded whatever its size, and what is
sampled is exactly what a saved file gives. ComfyUI empties its temporary folder at start and at exit; besides, files
that no handle names any more are removed before a new one is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy import model_management

from ...quant_core._version import __version__
from ...quant_core.checkpoint.part import remove
from ...quant_core.errors import Cancelled, QuantPressError
from .handles import held_files


def spool_folder() -> Path:
    folder = Path(folder_paths.get_temp_directory(), "quantpress")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def spool_path(label: str, key: dict[str, Any]) -> Path:
    """Where the result for this key belongs: the same key, the same file. key: JSON values that decide the bytes."""
    versioned = {"version": __version__, **key}
    digest = hashlib.sha256(json.dumps(versioned, sort_keys=True).encode()).hexdigest()[:20]
    return spool_folder() / f"{label[:80]}-{digest}.safetensors"


def report_path(spool: Path) -> Path:
    return spool.with_suffix(".json")


def lora_path(spool: Path) -> Path:
    """Where the low-rank part beside a quantized model belongs."""
    return spool.with_suffix(".lora.safetensors")


def finished_report(spool: Path) -> dict[str, Any] | None:
    """The report of a complete spool file; None when there is none. It is written last, so it tells."""
    report = report_path(spool)
    return json.loads(report.read_text("utf-8")) if spool.is_file() and report.is_file() else None


def spooled(label: str, key: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The spool file for this key and its report; made now, unless it was made before and is still there.

    key: JSON values that decide the bytes: what is done, every setting, and each source's path and `_folders.stamp`.
    make: writes the file at the given path, over an old one, and returns the report, JSON values. It may find that no
    file is needed and write none.
    Raises QuantPressError, and ComfyUI's InterruptProcessingException after Cancel; neither leaves a file.
    """
    spool = spool_path(label, key)
    report = finished_report(spool)
    if report is None:
        sweep()
        try:
            # ComfyUI executes nodes in inference mode, where the rounders that learn could not differentiate.
            with torch.inference_mode(False):
                report = make(spool)
        except Cancelled:
            model_management.throw_exception_if_processing_interrupted()
            raise
        except QuantPressError:
            remove(spool)
            raise
        if spool.is_file():
            report_path(spool).write_text(json.dumps(report), "utf-8")
    return spool, report


def sweep() -> None:
    """Remove spool files that nothing in the graph's cache refers to."""
    held = held_files()
    for path in spool_folder().glob("*.safetensors"):
        if path not in held:
            remove(report_path(path))
            remove(path)
