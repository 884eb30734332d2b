"""How far a long job is, and how long it will still take."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Sent after every tensor. Bytes count the source. eta_s: seconds left, None until it can be told."""

    layer: str
    done_layers: int
    total_layers: int
    done_bytes: int
    total_bytes: int
    elapsed_s: float
    eta_s: float | None

    @property
    def bytes_per_s(self) -> float:
        return self.done_bytes / self.elapsed_s if self.elapsed_s > 0 else 0.0


class Clock:
    """Makes the Progress of one job. All bytes count the same, quantized or copied: close enough for a time left.

    layers, nbytes: of the whole job. done_bytes: what is done when it begins. started: of time.monotonic, by default
    now.
    """

    def __init__(self, layers: int, nbytes: int, *, done_bytes: int = 0, started: float | None = None) -> None:
        self._layers, self._bytes = layers, nbytes
        self._done_layers, self._done_bytes = 0, done_bytes
        self._started = time.monotonic() if started is None else started

    def state(self, name: str) -> Progress:
        """Where the job is now. name: what it works on, or has just done."""
        elapsed, done = time.monotonic() - self._started, self._done_bytes
        left = elapsed * (self._bytes - done) / done if done else None
        return Progress(name, self._done_layers, self._layers, done, self._bytes, elapsed, left)

    def advance(self, name: str, nbytes: int, layers: int = 1) -> Progress:
        """Count `layers` more layers with `nbytes` bytes together as done."""
        self._done_layers += layers
        self._done_bytes += nbytes
        return self.state(name)
