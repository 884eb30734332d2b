"""Spool files: quantized models that are not saved (yet), in ComfyUI's temporary folder.

A model goes through a file even when it is only to be run: memory stays bounded whatever its size, and what is
sampled is exactly what a saved file gives. ComfyUI empties its temporary folder at start and at exit; besides, files
that no handle names any more are removed before a new one is written.
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import folder_paths

from ..quant_core.checkpoint.part import remove
from ._handles import held_files


def spool_folder() -> Path:
    folder = Path(folder_paths.get_temp_directory(), "quantpress")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def spool_path(label: str, key: dict[str, Any]) -> Path:
    """Where the result for this key belongs: the same key, the same file. key: JSON values that decide the bytes."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    return spool_folder() / f"{label[:80]}-{digest}.safetensors"


def report_path(spool: Path) -> Path:
    return spool.with_suffix(".json")


def finished_report(spool: Path) -> dict[str, Any] | None:
    """The report of a complete spool file; None when there is none. It is written last, so it tells."""
    report = report_path(spool)
    return json.loads(report.read_text("utf-8")) if spool.is_file() and report.is_file() else None


def sweep() -> None:
    """Remove spool files that nothing in the graph's cache refers to."""
    held = held_files()
    for path in spool_folder().glob("*.safetensors"):
        if path not in held:
            remove(report_path(path))
            remove(path)
