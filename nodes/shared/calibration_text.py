"""A calibration as the few lines that fit on a node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...quant_core.calibration.calibration import LayerSummary
from ...quant_core.calibration.capture.budget import BudgetPlan
from ...quant_core.calibration.storage import open_calibration
from ...quant_core.errors import counted

_WORST = 8


def summary(path: Path) -> str:
    """From the header alone. Raises InputFileError when the file is not a calibration."""
    with open_calibration(path) as reader:
        header, kinds = reader.header, Counter(reader.kind(layer).value for layer in reader.layers)
        early = sum(not run.completed for run in header.runs)
        labels: Counter[str] = Counter()
        for run in header.runs:
            labels.update(run.labels)
        lines = [
            f"{len(reader.layers)} of {counted(len(header.model.layers), 'layer')} seen, runs: {len(header.runs)}, "
            f"steps: {sum(len(run.steps) for run in header.runs)}" + (f" (stopped early: {early})" if early else ""),
            "Hessians: "
            + ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            + f"; {path.stat().st_size / 1e6:.1f} MB",
        ]
        if labels:
            total = sum(labels.values())
            shares = ", ".join(f"{label or 'unlabelled'} {count / total:.0%}" for label, count in labels.items())
            lines.append(f"inputs from: {shares}")
        calls = header.calls
        if calls.offered:
            refused = f"; {calls.refused} could not be kept" if calls.refused else ""
            lines.append(
                f"model calls kept: {len(calls.kept)} of {calls.offered}, {calls.nbytes / 1e6:.1f} MB{refused}"
            )
        loras = list(dict.fromkeys(name for run in header.runs for name in run.loras))
        return "\n".join(lines + ([f"captured with LoRAs or other patches: {', '.join(loras)}"] if loras else []))


def table(path: Path, rows: Sequence[LayerSummary], plan: BudgetPlan) -> str:
    """The summary, where the memory went, and the layers with the largest outliers."""
    lines = [
        summary(path),
        plan.describe().partition(". ")[2],
        f"rows per layer: {min(r.sampled for r in rows)} to {max(r.sampled for r in rows)}",
        "largest outliers (absmax / rms; channels):",
    ]
    for row in sorted(rows, key=lambda row: -row.absmax / max(row.rms, 1e-30))[:_WORST]:
        channels = ", ".join(str(channel) for channel, _, _ in row.channels)
        lines.append(
            f"  {row.layer}: {row.absmax / max(row.rms, 1e-30):.1f} ({row.absmax:.3g} / {row.rms:.3g}); {channels}"
        )
    broken = [row for row in rows if row.nonfinite]
    lines += [
        f"warning: {row.layer}: {counted(row.nonfinite, 'input')} held NaN or Inf and were left out"
        for row in broken[:5]
    ]
    return "\n".join(lines)
