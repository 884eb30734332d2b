"""Progress on stderr: a bar with throughput and time left on a terminal, a plain line now and then in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from .console import size_text, time_text

if TYPE_CHECKING:
    from ...quant_core.progress import Progress

_LINE_EVERY_S = 1.0  # never more often
_LINE_EVERY_PART = 0.05  # and then only when so much more is done,
_LINE_AT_LEAST_S = 10.0  # or after this long


@contextmanager
def show_progress(what: str, stream: TextIO | None = None) -> Iterator[Callable[[Progress], None]]:
    """Yields the callback for the engine's `progress=`. what: "quantizing", say. stream: sys.stderr by default."""
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        with _bar(what, stream) as show:
            yield show
    else:
        yield PlainLines(what, stream)


class PlainLines:
    """Lines for logs: at most one a second, and one per 5 % or per ten seconds, whichever comes first."""

    def __init__(self, what: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._stream, self._clock = what, stream, clock
        self._last_time, self._last_part = clock(), 0.0

    def __call__(self, state: Progress) -> None:
        now, part = self._clock(), state.done_bytes / state.total_bytes if state.total_bytes else 1.0
        waited = now - self._last_time
        if waited < _LINE_EVERY_S or (part - self._last_part < _LINE_EVERY_PART and waited < _LINE_AT_LEAST_S):
            return
        self._last_time, self._last_part = now, part
        print(
            f"{self._what}: {part:4.0%}, layer {state.done_layers} of {state.total_layers}, "
            f"{size_text(state.bytes_per_s)}/s{_eta(state)}",
            file=self._stream,
            flush=True,
        )


@contextmanager
def _bar(what: str, stream: TextIO) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[state]}"),
    )
    with Bar(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(what, total=None, state="")

        def show(state: Progress) -> None:
            text = f"layer {state.done_layers}/{state.total_layers}  {size_text(state.bytes_per_s)}/s{_eta(state)}"
            bar.update(task, completed=state.done_bytes, total=state.total_bytes, state=text)

        yield show


def _eta(state: Progress) -> str:
    return "" if state.eta_s is None else f", {time_text(state.eta_s)} left"
