"""Quantizing in order of execution, beside the running model.

Every layer sees what the quantized layers before it deliver. For that each recorded call of the model runs twice, side
by side and layer by layer (lockstep.py): once as it is, once with the layers that are quantized so far. So each layer
gets its inputs before and after. The price is two calls of the model for each recorded one. Beside the model there is
never more than one layer's decoded weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ...algorithms.asymmetric import LEAST_GROUPS, InputPairs
from ...algorithms.rounders.gptq import Gptq
from ...errors import RequestError, counted
from ...numerics.footprint import following_bytes, needed_bytes
from ..layer_plan import Quantized
from .lockstep import Lockstep, Stop, Visits, visits

_ENOUGH_ROWS, _ENOUGH_CALLS, _MOST_CALLS = 1 << 15, 8, 64
_INPUTS_HELD = 4


@dataclass(frozen=True, slots=True)
class LiveModel:
    """modules: the linear layers of the unquantized model, by name. calls: each runs one recorded call to its end.

    The calls run under inference mode, side by side. groups: one number per call. Calls of one picture or prompt are
    alike and have the same number; () where that is not known. most_calls: None for as many as pay.
    """

    modules: Mapping[str, nn.Module]
    calls: Sequence[Callable[[], None]]
    groups: Sequence[int] = ()
    most_calls: int | None = None

    def __post_init__(self) -> None:
        groups = len(set(self.groups or range(len(self.calls))))
        if groups < LEAST_GROUPS:
            raise RequestError(
                f"quantizing in order needs recorded calls of at least {LEAST_GROUPS} pictures or prompts, better of "
                f"twenty; the calibration holds {counted(len(self.calls), 'call')} of {groups}. Capture more of them, "
                f"with `calls` of {_MOST_CALLS}, or quantize without a model."
            )


@dataclass(frozen=True, slots=True)
class OrderedJob:
    """pairs: None for a layer that no call used."""

    job: Quantized
    pairs: InputPairs | None


class InOrder:
    """Made by in_order. Iterate over it, and `deliver` each layer that came with pairs before the next one is taken.

    calls: how many of the recorded ones are used.
    """

    def __init__(
        self,
        jobs: Sequence[Quantized],
        by_name: Mapping[str, Quantized],
        stops: Iterator[Stop],
        lockstep: Lockstep,
        calls: int,
        groups: Sequence[int] = (),
    ) -> None:
        self.calls = calls
        self._groups = groups or range(calls)
        self._jobs, self._by_name, self._stops, self._lockstep = jobs, by_name, stops, lockstep
        self._names = {job.layer: name for name, job in by_name.items()}
        self._inputs: Tensor | None = None

    def __iter__(self) -> Iterator[OrderedJob]:
        seen = set()
        for stop in self._stops:
            job = self._by_name[stop.layer]
            seen.add(job.layer)
            self._inputs = next(iter(stop.inputs.values()))
            yield OrderedJob(job, self._pairs(stop))
        self._inputs = None
        for job in self._jobs:
            if job.layer not in seen:
                yield OrderedJob(job, None)

    def _pairs(self, stop: Stop) -> InputPairs:
        found = [
            (stop.inputs[call], stop.inputs[self.calls + call], self._groups[call])
            for call in range(self.calls)
            if call in stop.inputs and self.calls + call in stop.inputs
        ]
        found = [(x, y, group) for x, y, group in found if x.shape == y.shape and x.numel()]
        return InputPairs([x for x, _, _ in found], [y for _, y, _ in found], [group for _, _, group in found])

    def deliver(self, layer: str, weight: Tensor, bias: Tensor | None) -> None:
        """What readers decode of the quantized layer: weight [N, K] and its bias [N]."""
        if self._inputs is not None:
            like = self._inputs
            self._lockstep.replace(
                self._names[layer],
                weight.to(like.device, like.dtype),
                None if bias is None else bias.to(like.device, like.dtype),
            )


@contextmanager
def in_order(jobs: Sequence[Quantized], name_of: Callable[[str], str | None], live: LiveModel) -> Iterator[InOrder]:
    """name_of: gives the model's name of a file's layer.

    Raises RequestError: the model and the file do not have the same layers.
    """
    by_name: dict[str, Quantized] = {}
    for job in jobs:
        name = name_of(job.layer)
        module = None if name is None else live.modules.get(name)
        if name is None or module is None or name in by_name or _shape(module) != job.shape:
            raise RequestError(
                f"{job.layer}: the model has no layer of this name and of shape {list(job.shape)}. Connect the model "
                "that ComfyUI loads from this very file, or quantize without a model."
            )
        by_name[name] = job
    modules = {name: live.modules[name] for name in by_name}
    visited = visits(modules, live.calls[0])
    if not visited.order:
        raise RequestError("the recorded calls use none of the layers to be quantized. Capture this model again.")
    used = spread(live.groups or range(len(live.calls)))[: live.most_calls or enough_calls(visited, len(live.calls))]
    calls = [live.calls[number] for number in used]
    lockstep = Lockstep(modules, [*calls, *calls], frozenset(range(len(calls), 2 * len(calls))), visited)
    with lockstep.stops() as stops:
        yield InOrder(
            jobs, by_name, stops, lockstep, len(calls), [live.groups[number] for number in used] if live.groups else ()
        )


def spread(groups: Sequence[int]) -> list[int]:
    """The calls' numbers: first one call of every group, then a second of every group, and so on.

    So the first few calls are of many groups.
    """
    seen: dict[int, int] = {}
    turns = []
    for group in groups:
        turns.append(seen.get(group, 0))
        seen[group] = turns[-1] + 1
    return sorted(range(len(groups)), key=turns.__getitem__)


def enough_calls(visited: Visits, recorded: int) -> int:
    """How many calls are replayed: enough for some ten thousand rows of a layer, at least 8 and at most 64.

    More rows cost time and memory and gain little. More than 64 calls of a small model show the same pictures many
    times, and then the calls that judge are too much like the calls that were fitted.
    """
    return min(recorded, max(_ENOUGH_CALLS, min(_MOST_CALLS, -(-_ENOUGH_ROWS // max(1, visited.rows)))))


@dataclass(frozen=True, slots=True)
class Room:
    """calls: how many fit. nbytes: what they and the largest layer's arithmetic take on the device."""

    calls: int
    nbytes: int


def room(live: LiveModel, most_bytes: int) -> Room:
    """Runs one call to see how large it is.

    most_bytes: what may be taken. At least _ENOUGH_CALLS calls are used in any case.
    """
    visited = visits(live.modules, live.calls[0])
    shapes = [_shape(module) for module in live.modules.values()]
    layer = max(max(needed_bytes(shape, Gptq.weight_copies, True), following_bytes(shape)) for shape in shapes)
    # What a waiting call holds is about a few inputs of a layer; each runs twice.
    waiting = 2 * _INPUTS_HELD * visited.nbytes // max(1, len(visited.order))
    fitting = max(_ENOUGH_CALLS, (most_bytes - layer) // max(1, waiting))
    calls = min(enough_calls(visited, len(live.calls)), fitting)
    return Room(calls, calls * waiting + layer)


def _shape(module: nn.Module) -> tuple[int, int]:
    """[N, K] of a linear layer."""
    linear = cast(nn.Linear, module)  # ComfyUI's own linear layers are not derived from it, but have the same fields
    return linear.out_features, linear.in_features
