"""Any quantized file to any format: each layer decoded with its own scales, then quantized; the loss is told."""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.layers import stored_layers
from ..checkpoint.source import open_source
from ..errors import RequestError
from ..policy.general import Policy
from ..recipe import Recipe
from ..report import Progress, RunReport
from ..run import convert


@dataclass(frozen=True, slots=True)
class RequantizeReport:
    """run: each layer's weight_error is against its decoded source. formats_before: {format: layers}."""

    run: RunReport
    formats_before: dict[str, int]

    @property
    def lossless_layers(self) -> int:
        return sum(layer.weight_error == 0.0 for layer in self.run.quantized)

    def to_json(self) -> dict[str, Any]:
        return {"formats_before": self.formats_before, "lossless_layers": self.lossless_layers, **self.run.to_json()}


def requantize(source: str | Path, target: str | Path, recipe: Recipe, policy: Policy | None = None, *,
               device: str | torch.device = "auto", overwrite: bool = False,
               progress: Callable[[Progress], None] | None = None,
               cancel: Callable[[], bool] | None = None) -> RequantizeReport:
    """policy: None requantizes exactly the layers that are quantized now. Raises QuantPressError; RequestError when none is."""
    with open_source(source) as src:
        stored = stored_layers(src)
    if not stored:
        raise RequestError(f"{source}: nothing in it is quantized. Run `quantpress quantize` on it.")
    before: dict[str, int] = {}
    for entry in stored.values():
        before[entry.format.name] = before.get(entry.format.name, 0) + 1
    if policy is None:
        policy = Policy(only=("^(" + "|".join(re.escape(layer) for layer in stored) + ")$",))
    report = convert(source, target, recipe, policy, device=device, overwrite=overwrite, progress=progress, cancel=cancel)
    return RequantizeReport(report, before)
