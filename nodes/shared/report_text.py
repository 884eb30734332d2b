"""Reports as the few lines that fit on a node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any

from ...quant_core.errors import counted
from ...quant_core.pipeline.report import against_nearest
from .progress import duration

_WORST = 3


def _calibrated(rows: list[Mapping[str, Any]]) -> list[str]:
    """What a calibration was used for; [] without one."""
    known = [row for row in rows if row.get("calibration_rows")]
    if not known:
        return []
    methods = Counter(f"{row['scales']} + {row['rounding']}" for row in known)
    parts = [f"{count} x {method}" for method, count in methods.most_common()]
    fell_back = sum(row.get("fell_back", False) for row in known)
    parts += [f"{fell_back} fell back to round-to-nearest"] if fell_back else []
    biases = sum(row["bias_corrected"] for row in known if "bias_corrected" in row)
    parts += [counted(biases, "bias corrected", "biases corrected")]
    return ["with the calibration: " + ", ".join(parts)]


def _in_order(rows: list[Mapping[str, Any]]) -> list[str]:
    """What quantizing in order did; [] without it."""
    left = [row["inputs_left"] for row in rows if row.get("inputs_left") is not None]
    if not left:
        return []
    return [
        f"in order: {sum(one < 1 for one in left)} of {len(left)} layers make up for those before them, which leaves "
        f"{median(left):.2f} of the error that these bring in (median, on calls kept aside)"
    ]


def _residual(rows: list[Mapping[str, Any]]) -> list[str]:
    """What the low-rank part gives back; [] without one."""
    errors = [(row.get("residual_error"), row.get("error") or row.get("weight_error")) for row in rows]
    shares = [left / error for left, error in errors if left is not None and error]
    if not shares:
        return []
    return [
        f"residual LoRA: {counted(len(shares), 'layer')}, with it {median(shares):.2f} of their error is left "
        "(median); Save Quantized Model writes it into models/loras"
    ]


def requantized(report: Mapping[str, Any]) -> str:
    """What requantizing did; its errors are against the decoded source."""
    before = ", ".join(f"{count} x {name}" for name, count in report["formats_before"].items())
    exact = sum(row.get("weight_error") == 0 for row in report["layers"] if row["format"])
    lossless = [f"{counted(exact, 'layer')} lost nothing"] if exact else []
    return "\n".join(
        [
            f"was: {before}",
            *lossless,
            summary(report, error="added error against the decoded source"),
        ]
    )


def summary(report: Mapping[str, Any], error: str = "weight error") -> str:
    """What a run did, from RunReport.to_json(). error: what its error is called."""
    rows = [row for row in report["layers"] if row["format"]]
    kept = Counter(row["reason"] for row in report["layers"] if not row["format"])
    formats = Counter(row["format"] for row in rows)
    before, after = report["source_bytes"], report["output_bytes"]
    lines = [
        f"{report.get('architecture') or 'unknown model'}: {before / 1e9:.3f} GB -> {after / 1e9:.3f} GB "
        f"({after / before:.0%}) in {duration(report['seconds'])} on {report['device']}",
        "quantized: "
        + ", ".join(f"{count} x {name}" for name, count in formats.most_common())
        + f" ({report['bits_per_weight']:.2f} bits per weight)",
    ]
    if kept:
        lines.append("kept: " + ", ".join(f"{count} x {reason}" for reason, count in kept.most_common(5)))
    if report["weight_error"] is not None:
        lines.append(f"{error}: {report['weight_error']:.2%} overall; worst layers:")
        worst = sorted(rows, key=lambda row: -(row.get("weight_error") or 0))[:_WORST]
        lines += [f"  {row['layer']}: {row.get('weight_error') or 0:.2%}" for row in worst]
    lines += list(against_nearest(rows)) + _calibrated(rows) + _in_order(rows) + _residual(rows)
    lines += [f"note: {note}" for note in dict.fromkeys(note for row in rows for note in row.get("notes", ()))][:5]
    return "\n".join(lines + [f"warning: {text}" for text in report["warnings"]])
