"""Writing while the next layer is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_UNWRITTEN_JOBS = 2  # jobs whose tensors wait for the disk


class Writer:
    """One background thread with at most _UNWRITTEN_JOBS waiting jobs; the first failure is raised by the next call."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._pending: list[Future[Any]] = []

    def submit(self, function: Callable[..., None], *args: Any) -> None:
        while len(self._pending) >= _UNWRITTEN_JOBS:
            self._pending.pop(0).result()
        self._pending.append(self._pool.submit(function, *args))

    def finish(self) -> None:
        while self._pending:
            self._pending.pop(0).result()

    def abandon(self) -> None:
        """After an error: drop what has not begun, so that leaving does not wait for it."""
        for future in self._pending:
            future.cancel()
