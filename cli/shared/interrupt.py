"""Ctrl-C and SIGTERM: a clean stop at the engine's next safe point, an immediate one outside of long work."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = 130
_STDERR = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt as SIGINT does.

    Handlers are restored at the end. Off the main thread nothing happens.
    """
    with _handling(_raise_interrupt):
        yield


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yields the question for the engine's `cancel=`: did a signal come? A second signal raises KeyboardInterrupt.

    Not an exception at once, because that could strike between the last two steps of publishing a file.
    """
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            _raise_interrupt(number, frame)
        stopped.set()
        with suppress(
            OSError
        ):  # not print: the signal may have come in the middle of one, which cannot be entered twice
            os.write(_STDERR, b"quantpress: stopping ...\n")

    with _handling(stop):
        yield stopped.is_set


def _raise_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers only there
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
