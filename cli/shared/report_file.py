"""`--report FILE.json`: checked before the conversion starts, written whole or not at all after it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...quant_core.checkpoint.same_file import is_same_file
from ...quant_core.errors import OutputError
from .console import json_text


def check_report_path(report: Path, target: Path, sources: Iterable[Path], overwrite: bool) -> None:
    """OutputError when the report could not be written, or would replace something that is not a report."""
    for other, what in ((target, "the output"), *((source, "the input") for source in sources)):
        if report.resolve() == other.resolve() or is_same_file(report, other):
            raise OutputError(f"--report {report}: this is {what} itself. Give the report a name of its own.")
    if report.is_dir():
        raise OutputError(f"--report {report}: this is a folder; a file is needed. Add a name ending in .json.")
    if not report.parent.is_dir():
        raise OutputError(f"--report {report}: the folder {report.parent} is missing. Create it, or correct the path.")
    if not os.access(report.parent, os.W_OK):
        raise OutputError(f"--report {report}: the folder {report.parent} is read-only. Choose another folder.")
    if report.exists() and not overwrite:
        raise OutputError(f"--report {report}: the file exists. Choose another name, or allow it with --overwrite.")


def write_report(report: Path, content: Any) -> None:
    """Into a temporary file beside it, then renamed.

    OutputError when the disk refuses; the model is complete by then.
    """
    part = report.with_name(f".{report.name}.{os.getpid()}.part")
    try:
        try:
            part.write_text(json_text(content) + "\n", encoding="utf-8")
            os.replace(part, report)
        finally:
            part.unlink(missing_ok=True)
    except OSError as err:
        raise OutputError(
            f"--report {report}: the report cannot be written: {err.strerror or err}. The model itself is complete."
        ) from err
