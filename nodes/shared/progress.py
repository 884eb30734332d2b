"""Progress of an engine run on a node: bar, text with the time left, and Cancel."""

from __future__ import annotations

import time
from collections.abc import Callable

from comfy import model_management, utils

from ...quant_core.errors import counted
from ...quant_core.progress import Progress

_STEPS = 1000
_TEXT_EVERY_S = 0.3


class NodeProgress:
    """Pass `__call__` as the engine's progress and `cancelled` as its cancel. node_id: the node that shows it."""

    def __init__(self, node_id: str | None, what: str) -> None:
        self._bar = utils.ProgressBar(_STEPS, node_id=node_id)
        self._node_id, self._what, self._shown_at = node_id, what, 0.0

    def __call__(self, state: Progress) -> None:
        model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(_STEPS * state.done_bytes // max(1, state.total_bytes))
        now = time.monotonic()
        if now - self._shown_at >= _TEXT_EVERY_S:
            self._shown_at = now
            self.say(progress_text(self._what, state))

    def say(self, text: str) -> None:
        """Show a line of text on the node."""
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None and self._node_id is not None:
            server.send_progress_text(text, self._node_id)

    @staticmethod
    def cancelled() -> bool:
        return model_management.processing_interrupted()


def then_checking(progress: NodeProgress) -> Callable[[Progress], None]:
    """The node's progress, which then says that the file is checked.

    Every byte is read back once all are written, which takes about as long and moves no bar.
    """

    def tell(state: Progress) -> None:
        progress(state)
        if state.done_bytes >= state.total_bytes:
            progress.say("Checking what was written")

    return tell


def progress_text(what: str, state: Progress) -> str:
    left = "" if state.eta_s is None else f", {duration(state.eta_s)} left"
    return (
        f"{what}: {state.done_layers} of {counted(state.total_layers, 'layer')}, {state.done_bytes / 1e9:.2f} of "
        f"{state.total_bytes / 1e9:.2f} GB{left}"
    )


def duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"
