"""Any quantized file to any format: each layer decoded with its own scales, then quantized; the loss is told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.source import open_source
from ..errors import RequestError
from ..pipeline.report import RunReport
from ..pipeline.request import Request
from ..pipeline.run import convert
from ..policy.general import Policy
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
    request: Request,
    *,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> RequantizeReport:
    """Exactly the layers that are quantized now, unless the request names others in only.

    Raises QuantPressError; RequestError when nothing is quantized.
    """
    before, policy = only_quantized(request.source, request.policy)
    report = convert(replace(request, policy=policy), progress=progress, cancel=cancel)
    return RequantizeReport(report, before)


def only_quantized(path: Path, policy: Policy) -> tuple[dict[str, int], Policy]:
    """({format: layers}, the policy, which names exactly these layers in only where it named none).

    Raises RequestError: nothing in the file is quantized.
    """
    with open_source(path) as src:
        stored = stored_layers(src)
        if not stored:
            raise RequestError(f"{src.path}: nothing in it is quantized. Quantize it instead.")
    if not policy.only:
        policy = replace(policy, only=("^(" + "|".join(re.escape(layer) for layer in stored) + ")$",))
    return dict(Counter(entry.format.name for entry in stored.values())), policy
