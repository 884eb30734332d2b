"""Text for people and JSON for scripts: sizes, plain aligned tables, and JSON without NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any


def size_text(count: float) -> str:
    """Bytes as "23.1 MB": powers of 1000, as disks and file managers count."""
    if abs(count) < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if abs(count) < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def duration_text(seconds: float) -> str:
    """How long it took: "0.4 s", from a minute on as time_text."""
    return f"{seconds:.1f} s" if seconds < 59.95 else time_text(seconds)


def time_text(seconds: float) -> str:
    """Seconds as "0:42", or "1:02:03"."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table_lines(
    rows: Sequence[Sequence[str]], header: Sequence[str] = (), right: Sequence[int] = (), indent: str = ""
) -> list[str]:
    """Columns as wide as their widest cell, two spaces apart. right: numbers of the right-aligned columns."""
    lines = [header, *rows] if header else list(rows)
    if not lines:
        return []
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    if header:
        lines.insert(1, ["-" * width for width in widths])
    return [
        (
            indent
            + "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        ).rstrip()
        for line in lines
    ]


def print_json(content: Any) -> None:
    """The only thing on stdout. NaN and infinities, which JSON lacks, become null."""
    print(json_text(content), flush=True)


def json_text(content: Any) -> str:
    """Indented JSON without a newline at the end; see print_json."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
