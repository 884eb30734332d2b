"""From a quantized handle to a plain source."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...quant_core.tools.dequantize import dequantize
from ..shared.detection import detect
from ..shared.folders import stamp
from ..shared.handles import QuantizedHandle, SourceHandle, origins_of, spool_of
from ..shared.progress import NodeProgress, duration
from ..shared.spool import spooled

NAME = "Dequantize"


def dequantized(quantized: QuantizedHandle, dtype: str, progress: NodeProgress) -> tuple[SourceHandle, str]:
    """The decoded model in a spool file, and what was done.

    Raises QuantPressError; neither it nor Cancel leaves a file.
    """
    path = spool_of(quantized)

    def make(spool: Path) -> dict[str, Any]:
        report = dequantize(path, spool, dtype, overwrite=True, progress=progress, cancel=progress.cancelled)
        return {**asdict(report), "layers": dict(report.layers), "architecture": detect(spool).model}

    spool, report = spooled(
        quantized.label, {"tool": NAME, "source": str(path), "stamp": stamp(path), "dtype": dtype}, make
    )
    handle = SourceHandle(spool, f"{quantized.label}-{dtype}", NAME, origins_of(quantized))
    return handle, _text(report)


def _text(report: dict[str, Any]) -> str:
    before, after = report["source_bytes"], report["output_bytes"]
    formats = ", ".join(f"{count} x {name}" for name, count in report["layers"].items())
    lines = [
        f"{report['architecture'] or 'unknown model'}: {before / 1e9:.3f} GB -> {after / 1e9:.3f} GB in "
        f"{duration(report['seconds'])}",
        f"decoded to {report['dtype']}: {formats}",
    ]
    if report["dropped"]:
        lines.append(f"left out: {len(report['dropped'])} legacy markers and scales of 1")
    return "\n".join(lines)
