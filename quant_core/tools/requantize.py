"""Any quantized file to any format: each layer decoded with its own scales, then quantized; the loss is told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.source import Source, open_source
from ..errors import RequestError
from ..pipeline.report import RunReport
from ..pipeline.run import convert
from ..policy.general import Policy
from ..policy.recipe import Recipe
from ..progress import Progress
from ..stored.layers import stored_layers


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


def requantize(
    source: str | Path,
    target: str | Path,
    recipe: Recipe,
    policy: Policy | None = None,
    *,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> RequantizeReport:
    """policy: None requantizes exactly the layers that are quantized now. Raises QuantPressError; RequestError when none is."""
    with open_source(source) as src:
        before, same = only_quantized(src)
    report = convert(
        source,
        target,
        recipe,
        same if policy is None else policy,
        device=device,
        overwrite=overwrite,
        progress=progress,
        cancel=cancel,
    )
    return RequantizeReport(report, before)


def only_quantized(src: Source) -> tuple[dict[str, int], Policy]:
    """({format: layers}, the policy that names exactly these layers). RequestError: nothing in the file is quantized."""
    stored = stored_layers(src)
    if not stored:
        raise RequestError(f"{src.path}: nothing in it is quantized. Quantize it instead.")
    return dict(Counter(entry.format.name for entry in stored.values())), Policy(
        only=("^(" + "|".join(re.escape(layer) for layer in stored) + ")$",)
    )
