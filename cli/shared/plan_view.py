"""The plan of a conversion as text and as JSON, one line per group of like layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...quant_core.errors import counted
from ...quant_core.pipeline.layer_plan import Kept, Quantized
from ...quant_core.pipeline.plan import Plan
from ...quant_core.pipeline.request import Request
from .console import size_text, table_lines
from .groups import collapse


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that differ only in their numbers. format: None when they are kept. Bytes are of the whole group."""

    layers: str
    count: int
    shape: tuple[int, int]
    source: str
    format: str | None
    reason: str
    bytes_in: int
    bytes_out: int

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "count": self.count,
            "shape": list(self.shape),
            "source": self.source,
            "format": self.format,
            "reason": self.reason,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }


def plan_groups(layers: Sequence[Kept | Quantized]) -> list[Group]:
    """Groups of layers with the same name pattern, shape, source, format and reason, in file order."""
    alike: dict[tuple, list[Kept | Quantized]] = {}
    for layer in layers:
        fmt = layer.recipe.format.name if isinstance(layer, Quantized) else None
        alike.setdefault((layer.shape, layer.source, fmt, layer.reason, layer.bytes_in, layer.bytes_out), []).append(
            layer
        )
    groups = []
    for (shape, source, fmt, reason, bytes_in, bytes_out), members in alike.items():
        groups += [
            Group(pattern, count, shape, source, fmt, reason, count * bytes_in, count * bytes_out)
            for pattern, count in collapse(layer.layer for layer in members)
        ]
    return groups


def plan_json(plan: Plan, request: Request) -> dict[str, Any]:
    """The object that --dry-run --json prints; docs/json.md describes it."""
    return {
        "dry_run": True,
        "source": str(request.source),
        "target": str(request.target),
        "target_exists": request.target.exists(),
        "recipe": request.recipe.describe(),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "peak_bytes_estimate": plan.peak_bytes,
        "layers_quantized": len(plan.quantized),
        "layers_kept": len(plan.kept),
        "tensors_copied": len(plan.copied),
        "warnings": list(plan.warnings),
        "groups": [group.to_json() for group in plan_groups(plan.layers)],
    }


def plan_lines(plan: Plan, request: Request) -> list[str]:
    """What --dry-run prints."""
    groups = plan_groups(plan.layers)
    settings = ", ".join(f"{key} {value}" for key, value in request.recipe.describe().items())
    lines = [f"{request.source} -> {request.target} (dry run, nothing is written)", settings, ""]
    for title, chosen in (
        ("quantized", [g for g in groups if g.format]),
        ("kept", [g for g in groups if not g.format]),
    ):
        if chosen:
            lines += [
                f"{title}: {counted(sum(g.count for g in chosen), 'layer')}, "
                f"{size_text(sum(g.bytes_in for g in chosen))} -> {size_text(sum(g.bytes_out for g in chosen))}"
            ]
            lines += table_lines([_cells(group) for group in chosen], right=(1, 4), indent="  ")
            lines.append("")
    lines += [
        f"copied byte for byte: {counted(len(plan.copied), 'tensor')}, kept layers included",
        f"total: {size_text(plan.source_bytes)} -> {size_text(plan.output_bytes)} "
        f"({plan.output_bytes / plan.source_bytes:.0%})",
        f"peak memory: about {size_text(plan.peak_bytes)}",
    ]
    return lines + [f"warning: {warning}" for warning in plan.warnings]


def _cells(group: Group) -> tuple[str, ...]:
    what = f"{group.source} -> {group.format}" if group.format else group.source
    return (group.layers, f"{group.count}x", str(list(group.shape)), what, size_text(group.bytes_out), group.reason)
