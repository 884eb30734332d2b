"""What a run did: plain data for people, tests and the report file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ..errors import Problem
from ..numerics.metrics import snr_db
from .layer import Judgement


@dataclass(frozen=True, slots=True)
class LayerReport:
    """format: None for a kept layer; reason says why it is kept.

    weight_error: relative Frobenius error of the decoded weight. seconds: compute only.
    judgement: the algorithms that were used. They differ from the recipe where it says "auto", and where an algorithm
    fell back. rows: how many captured inputs were known. bias_corrected: None where that was not asked for.
    input_scale: as written, None where none is. residual_error: relative, with the low-rank part added.
    """

    layer: str
    shape: tuple[int, int]
    source: str
    format: str | None
    reason: str
    bytes_in: int
    bytes_out: int
    weight_error: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    judgement: Judgement | None = None
    rows: int = 0
    bias_corrected: bool | None = None
    input_scale: float | None = None
    residual_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        error = self.weight_error
        row: dict[str, Any] = {
            "layer": self.layer,
            "shape": list(self.shape),
            "source": self.source,
            "format": self.format,
            "reason": self.reason,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }
        if error is not None:
            snr = snr_db(error)
            row |= {
                "weight_error": error if math.isfinite(error) else None,
                "seconds": round(self.seconds, 4),
                "weight_snr_db": round(snr, 3) if math.isfinite(snr) else None,
            }
        if self.judgement is not None:
            row |= {**asdict(self.judgement), "calibration_rows": self.rows}
        extras = {
            "bias_corrected": self.bias_corrected,
            "input_scale": self.input_scale,
            "residual_error": self.residual_error,
        }
        row |= {key: value for key, value in extras.items() if value is not None}
        return row | ({"notes": list(self.notes)} if self.notes else {})


# What Judgement.objective measures, for people. "projected" is the learned rounding's own, where no inputs are known:
# the weight's error along the directions in which the weight itself is largest.
_MEASURED = {
    "output": "output error",
    "weighted": "output error by the inputs' mean squares",
    "weight": "weight error",
    "projected": "weight error along the weight's main directions",
}


def against_nearest(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """How the layers' errors compare with rounding to nearest: a sentence for each kind of error.

    rows: of LayerReport.to_json(). Returns () where no layer was compared.
    """
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        error, nearest = row.get("error"), row.get("nearest_error")
        if error is not None and nearest:
            shares.setdefault(row["objective"], {})[row["layer"]] = error / nearest
    lines = []
    for objective, found in shares.items():
        worst = max(found, key=found.__getitem__)
        lines.append(
            f"{_MEASURED.get(objective, objective)} against rounding to nearest: "
            f"median {median(found.values()):.2f}x, worst {found[worst]:.2f}x ({worst})"
        )
    return tuple(lines)


@dataclass(frozen=True, slots=True)
class RunReport:
    """One conversion. recipe: as recorded in the file. peak_bytes: the plan's estimate."""

    source: str
    target: str
    recipe: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    warnings: tuple[Problem, ...]
    source_bytes: int
    output_bytes: int
    peak_bytes: int
    seconds: float
    device: str

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.format is not None)

    @property
    def weight_error(self) -> float:
        """Relative error over all quantized weights together: sqrt of the size-weighted mean square."""
        rows = [(r.weight_error, r.shape[0] * r.shape[1]) for r in self.quantized if r.weight_error is not None]
        total = sum(count for _, count in rows)
        return math.sqrt(sum(e * e * count for e, count in rows) / total) if total else math.nan

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized layers, scales and metadata included."""
        weights = sum(r.shape[0] * r.shape[1] for r in self.quantized)
        return sum(r.bytes_out for r in self.quantized) * 8 / weights if weights else math.nan

    def to_json(self) -> dict[str, Any]:
        error = self.weight_error
        return {
            "source": self.source,
            "target": self.target,
            "recipe": dict(self.recipe),
            "device": self.device,
            "seconds": round(self.seconds, 3),
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "peak_bytes_estimate": self.peak_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "weight_error": error if math.isfinite(error) else None,
            "layers_quantized": len(self.quantized),
            "layers_kept": len(self.layers) - len(self.quantized),
            "warnings": [str(warning) for warning in self.warnings],
            "layers": [layer.to_json() for layer in self.layers],
        }
