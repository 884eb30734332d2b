"""Cancelling from anywhere in the engine, without handing a callback through every function.

The caller opens a scope with its own question ("was Cancel pressed?"); every long loop calls `poll`, which asks it at
most twenty times a second and raises Cancelled. Without a scope polling costs a context lookup.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from .errors import Cancelled

_ASK_EVERY_S = 0.05


class _Scope:
    __slots__ = ("asked_at", "question")

    def __init__(self, question: Callable[[], bool]) -> None:
        self.question = question
        self.asked_at = 0.0


_scope: ContextVar[_Scope | None] = ContextVar("quantpress_cancel", default=None)


@contextmanager
def cancel_scope(question: Callable[[], bool] | None) -> Iterator[None]:
    """Within it, `poll` raises Cancelled once `question()` is true. None: an enclosing scope stays in force."""
    if question is None:
        yield
        return
    token = _scope.set(_Scope(question))
    try:
        yield
    finally:
        _scope.reset(token)


def poll() -> None:
    """Raise Cancelled if the caller's scope says so. Call it in every loop that can run longer than a second."""
    scope = _scope.get()
    if scope is None:
        return
    now = time.monotonic()
    if now - scope.asked_at >= _ASK_EVERY_S:
        scope.asked_at = now
        if scope.question():
            raise Cancelled("cancelled; nothing was left behind")
