"""How far a run is and how long it will take."""

from __future__ import annotations

import time

from ..checkpoint.source import Source
from .plan import LayerPlan, Plan
from .report import Progress


class Clock:
    """Progress by bytes: a quantized byte and a copied byte count the same, which is close enough for an ETA."""

    def __init__(self, plan: Plan, src: Source, started: float) -> None:
        self._total = len(plan.quantized)
        self._sizes = {name: info.nbytes for name, info in src.tensors.items()}
        self._bytes = sum(job.bytes_in for job in plan.quantized) + sum(self._sizes[name] for name in plan.copied)
        self._started, self._done, self._done_bytes = started, 0, 0

    def state(self, name: str) -> Progress:
        elapsed = time.monotonic() - self._started
        left = self._bytes - self._done_bytes
        eta = elapsed * left / self._done_bytes if self._done_bytes else None
        return Progress(name, self._done, self._total, self._done_bytes, self._bytes, elapsed, eta)

    def advance(self, job: LayerPlan) -> Progress:
        self._done += 1
        self._done_bytes += job.bytes_in
        return self.state(job.layer)

    def copied(self, name: str) -> Progress:
        self._done_bytes += self._sizes[name]
        return self.state(name)
