"""Many calls of one model, side by side. All of them wait before a layer until that layer has been quantized.

A model is a function. It can be left in the middle and gone on with only as a greenlet, which has a call stack of its
own in the same thread. Threads would do too, but each would take a cuBLAS handle for the life of the process (measured
on an H200: 64 MB, and a workspace of 32 MB). While a call waits its activations stay alive: about a hundred megabytes
for one call of a large model.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...cancel import poll
from ...errors import RequestError


@dataclass(frozen=True, slots=True)
class Visits:
    """What one call of the model does. order: the layers in the order of their first use. again: used more than once.

    rows: of the largest input, [rows, K]. nbytes: of all the layers' inputs together.
    """

    order: tuple[str, ...]
    again: frozenset[str]
    rows: int
    nbytes: int


@dataclass(slots=True)
class Stop:
    """All calls that get to `layer` wait before it. inputs: {number of the call: [..., K]}."""

    layer: str
    inputs: dict[int, Tensor]


@dataclass(frozen=True, slots=True)
class Replacement:
    """What a layer is for the calls that run the quantized model. weight: [N, K]; bias: [N] or None."""

    weight: Tensor
    bias: Tensor | None


class _Left(BaseException):
    """Raised inside a model's call to leave it. No error: nobody outside sees it."""


@dataclass(slots=True, eq=False)
class _Call:
    """layer, input: where it waits, and with what. autocast: as it was there."""

    number: int
    stack: Any
    layer: str | None = None
    input: Tensor | None = None
    autocast: tuple[tuple[str, bool, torch.dtype], ...] | None = None

    @property
    def done(self) -> bool:
        return self.stack.dead


def visits(modules: Mapping[str, nn.Module], call: Callable[[], None]) -> Visits:
    """Runs one call and looks. modules: the layers to be quantized, by name."""
    seen: dict[str, int] = {}
    sizes = [0, 0]

    def look(name: str, x: Tensor) -> None:
        seen[name] = seen.get(name, 0) + 1
        sizes[0] = max(sizes[0], x.numel() // x.shape[-1])
        sizes[1] += x.numel() * x.element_size()

    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: look(name, _input(args, kwargs)), with_kwargs=True
            )
            hooks.callback(hook.remove)
        with torch.inference_mode():
            call()
    return Visits(tuple(seen), frozenset(name for name, count in seen.items() if count > 1), sizes[0], sizes[1])


class Lockstep:
    """modules: by name. calls: each runs one call of the model to its end, under inference mode.

    quantized: the numbers of those calls for which `replace` puts another weight in place. The others run the model as
    it is. visited: of the same modules.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        calls: Sequence[Callable[[], None]],
        quantized: frozenset[int],
        visited: Visits,
    ) -> None:
        self._modules, self._runs = modules, calls
        self._quantized, self._visited = quantized, visited
        self._rank = {name: rank for rank, name in enumerate(visited.order)}
        self._replaced: dict[str, Replacement] = {}
        self._passed: set[str] = set()
        self._calls: list[_Call] = []
        self._running: _Call | None = None
        self._leaving = False
        self._greenlet = _greenlet()

    @contextmanager
    def stops(self) -> Iterator[Iterator[Stop]]:
        """The layers one by one, in order; the consumer calls `replace` before it takes the next one.

        An error inside a call is raised here. On any exit every call has ended and every hook is gone.
        """
        with ExitStack() as stack:
            for name, module in self._modules.items():
                before = module.register_forward_pre_hook(self._wait(name), with_kwargs=True)
                after = module.register_forward_hook(self._answer(name), with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.callback(self._leave)
            yield self._walk()

    def replace(self, layer: str, weight: Tensor, bias: Tensor | None) -> None:
        """Where the quantized calls go on with this layer. In the dtype and on the device of its inputs."""
        self._replaced[layer] = Replacement(weight, bias)

    def _walk(self) -> Iterator[Stop]:
        for number, run in enumerate(self._runs):
            poll()
            self._calls.append(_Call(number, self._greenlet.greenlet(run)))
            self._calls[-1].stack.gr_context = contextvars.copy_context()
            self._go_on(self._calls[-1])
        while True:
            waits = {call.layer for call in self._calls if not call.done and call.layer is not None}
            if not waits:
                return
            layer = min(waits, key=self._rank.__getitem__)
            here = [call for call in self._calls if not call.done and call.layer == layer]
            stop = Stop(layer, {call.number: call.input for call in here if call.input is not None})
            yield stop
            stop.inputs.clear()
            self._passed.add(layer)
            for call in here:
                poll()
                call.input = None
                self._go_on(call)
            if layer not in self._visited.again:
                self._replaced.pop(layer, None)

    def _go_on(self, call: _Call) -> None:
        """Until it waits again, or ends; an error in it is raised here."""
        call.stack.parent = self._greenlet.getcurrent()
        before = _autocast()
        _set_autocast(call.autocast or before)
        self._running = call
        try:
            with torch.inference_mode():  # entered here and not in the call, because calls end in any order
                try:
                    call.stack.switch()
                finally:
                    call.autocast = _autocast()
        finally:
            self._running = None
            _set_autocast(before)

    def _leave(self) -> None:
        self._leaving = True
        for call in self._calls:
            call.stack.parent = self._greenlet.getcurrent()
            while call.stack and not call.done:
                with suppress(_Left):
                    call.stack.throw(_Left)

    # ---- inside the calls ------------------------------------------------------------------------------------------
    def _wait(self, name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            call = self._running
            if self._leaving:
                raise _Left
            if call is None:
                return
            if name in self._passed:
                if call.number in self._quantized and name not in self._replaced and name not in self._visited.again:
                    raise RequestError(
                        f"{name}: some calls of the model use this layer more often, or later, than others, so it "
                        "cannot be quantized in order. Quantize without a model."
                    )
                return
            if name not in self._rank:
                raise RequestError(
                    f"{name}: only some calls of the model use this layer, so it cannot be quantized in order. "
                    "Quantize without a model."
                )
            call.layer, call.input = name, _input(args, kwargs).detach()
            call.stack.parent.switch()
            if self._leaving:
                raise _Left

        return before

    def _answer(self, name: str) -> Callable[[nn.Module, tuple, dict, Tensor], Tensor | None]:
        def after(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            call, found = self._running, self._replaced.get(name)
            if call is None or call.number not in self._quantized or found is None:
                return None
            return torch.nn.functional.linear(_input(args, kwargs), found.weight, found.bias)

        return after


def _greenlet() -> ModuleType:
    # Only quantizing in order needs it, and it is compiled code that a computer may lack.
    try:
        import greenlet  # type: ignore[import-untyped]  # it comes without type stubs
    except ImportError as err:
        raise RequestError(
            "quantizing in order needs the Python package greenlet, which is missing. Install the pack's "
            "requirements.txt again, or quantize without a model."
        ) from err
    return greenlet


def _autocast() -> tuple[tuple[str, bool, torch.dtype], ...]:
    """The one state of torch that a model may change around its layers and that does not go with a greenlet."""
    return tuple(
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
    )


def _set_autocast(state: tuple[tuple[str, bool, torch.dtype], ...]) -> None:
    for device, enabled, dtype in state:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["input"]
