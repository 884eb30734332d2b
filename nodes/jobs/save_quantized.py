"""Saving a quantized model: what its file must pass, and the file of its low-rank part."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ...quant_core.checkpoint.source import open_source
from ...quant_core.checkpoint.suffixes import SUFFIX, without_suffix
from ...quant_core.errors import InputFileError, OutputError
from ...quant_core.pipeline.verify import check_file
from ..shared.file_name import listed_name
from ..shared.folders import LORAS, write_target
from ..shared.handles import QuantizedHandle, origins_of
from ..shared.publish import keep_origins, verified


def check_of(handle: QuantizedHandle) -> Callable[[Path], object]:
    """What a saved file must pass: the loaders' rules, or for a lenient one that it can be read at all."""
    return readable if handle.lenient else verified


def warnings_of(handle: QuantizedHandle) -> list[str]:
    """What a loader would stumble over in a lenient file."""
    return [f"warning: {finding.message}" for finding in check_file(handle.path).errors] if handle.lenient else []


def readable(path: Path) -> None:
    """Raises InputFileError."""
    with open_source(path):
        pass


def lora_target(handle: QuantizedHandle, name: str, overwrite: bool) -> tuple[str, Path] | None:
    """(name as the loaders list it, file) for the low-rank part of a model that is saved as `name`; None without one.

    Raises InputFileError: its spool file is gone; OutputError: the name is taken.
    """
    if handle.lora is None:
        return None
    if not handle.lora.is_file():
        raise InputFileError(
            f"{handle.lora.name} is gone from ComfyUI's temporary folder. Change any input of Quantize Model, the "
            "seed for example, and run again."
        )
    listed = without_suffix(listed_name(name), SUFFIX) + f"-residual{SUFFIX}"
    target = write_target(LORAS, listed)
    keep_origins(target, origins_of(handle))
    if not overwrite and os.path.lexists(target):
        raise OutputError(f"{target}: the file exists. Choose another name, or switch overwrite on.")
    return listed, target
