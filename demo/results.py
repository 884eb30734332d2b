"""What the demo measures, one row per format, and the two files that hold it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class FormatRow:
    """One format. SNR and PSNR in dB; inf: identical to the original; -inf: the output holds NaN or Inf.

    bits_per_weight: of the quantized layers, with scales. weight_snr_db: over all quantized layers together.
    output_snr_db: one step. latent_snr_db, picture_psnr_db: after all steps. kept: {reason: number of layers}.
    runs_through: "layout" (QuantizedTensor dispatch) or "dequantized". The activations are float32 unless the layout
    quantizes them itself, as the int8 and int4 layouts of comfy-kitchen do.
    """

    format: str
    file: str
    file_bytes: int
    bits_per_weight: float
    weight_snr_db: float
    output_snr_db: float
    latent_snr_db: float
    picture_psnr_db: float
    quantize_seconds: float
    sample_seconds: float
    quantized_layers: int
    kept_layers: int
    kept: Mapping[str, int]
    runs_through: str


def write_csv(path: Path, rows: Sequence[FormatRow]) -> None:
    """One line per format, numbers in full precision; `kept` reads "3 reason; 1 other reason"."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(FormatRow)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(_plain(row) | {"kept": "; ".join(f"{count} {why}" for why, count in row.kept.items())})


def write_json(path: Path, about: Mapping[str, Any], rows: Sequence[FormatRow]) -> None:
    """{**about, "rows": [...]}. JSON has no infinity, so an infinite ratio is the string "inf" or "-inf"."""
    content = {**about, "rows": [_plain(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _plain(row: FormatRow) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, float) and math.isinf(value) else value
        for key, value in asdict(row).items()
    }
