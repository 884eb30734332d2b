"""Whole model calls, kept to be replayed: an even sample of all the calls of a capture.

A call is a tree: dicts with str keys, lists and tuples, and at its ends tensors, int, float, bool, str and None. It is
kept as JSON plus its tensors by path. In the JSON {"tuple": [...]}, {"dict": {...}}, {"tensor": path} and
{"float": "nan"} (also "inf", "-inf") stand for what JSON lacks. Everything else is itself, a list too.

A path is the keys and indices on the way to a tensor, joined by dots ("control.input.0"). Inside a key "." is written
%2E, and "%" is written %25.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.header import TORCH_TO_CODE, tensor_bytes

Json = Any  # what json.loads can give
MAX_BYTES = 2 * 2**30
MAX_TEXT_BYTES = 8 * 2**20  # of all trees of a sample: they and their tensors' names share a header of at most 100 MB
_CALL_TEXT_BYTES = 2**16
_DEPTH = 8


@dataclass(frozen=True, slots=True, eq=False)
class RecordedCall:
    """arguments: by name; tensors are detached, dense, on the CPU, in memory of their own. nbytes: of all tensors."""

    arguments: dict[str, Any]
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class KeptCall:
    """A call of a sample, in memory or in a file.

    group: the same for the calls of one sampling, whose steps are alike.
    tensors: path -> (safetensors dtype code, shape). fetch: path -> tensor.
    nbytes: of all tensors. text_bytes: of the tree.
    """

    key: int
    group: int
    tree: Json
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    fetch: Callable[[str], Tensor]
    nbytes: int = field(init=False)
    text_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", sum(tensor_bytes(code, shape) for code, shape in self.tensors.values()))
        object.__setattr__(self, "text_bytes", len(json.dumps(self.tree, ensure_ascii=False).encode("utf-8")))

    def call(self) -> RecordedCall:
        """In memory; one of a file is read now."""
        return RecordedCall(_tree_to_arguments(self.tree, self.fetch), self.nbytes)

    def in_memory(self) -> KeptCall:
        """The same with tensors of its own, on the CPU."""
        return replace(self, fetch={path: _own(self.fetch(path)) for path in self.tensors}.__getitem__)


def record(arguments: Mapping[str, Any]) -> RecordedCall | None:
    """A copy of a call's arguments, by name.

    None when they hold anything but the types of a tree: it cannot be replayed.
    """
    found = _described(arguments, 0)
    return None if found is None else found.in_memory().call()


def is_recordable(value: Any) -> bool:
    """Whether it can be an argument of a recorded call, or a part of one. Copies nothing."""
    return _described({"": value}, 0) is not None


def call_key(seed: int, run: int, call: int) -> int:
    """53 random bits that depend on these three alone, so that a sample is the same on any device.

    Smaller ones are kept.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}, run {run}, call {call}".encode()).digest()[:8], "big") >> 11


def call_group(seed: int, run: int, note: str) -> int:
    """53 bits for all calls of one run. note: what else tells it from the runs of another capture."""
    return call_key(seed, run, -1) ^ (int.from_bytes(hashlib.sha256(note.encode()).digest()[:8], "big") >> 11)


class CallSample:
    """The calls with the smallest keys of all that were offered: at most `limit`, of at most `max_bytes` together.

    kept: in order of rising key, so the first n of them are an even sample too. offered: calls seen.
    refused: how many of those that were due to be kept cannot be. A replay would differ, something in them is not a
    tree, or one is larger than the budget.
    """

    def __init__(self, limit: int = 0, max_bytes: int = MAX_BYTES) -> None:
        if limit < 0 or max_bytes < 0:
            raise ValueError(f"a sample of at most {limit} calls and {max_bytes} bytes; neither can be negative")
        self.limit, self.max_bytes = limit, max_bytes
        self.reset()

    def reset(self) -> None:
        """Forget every call."""
        self.kept: tuple[KeptCall, ...] = ()
        self.offered = self.refused = 0
        self._bound: float = math.inf  # a call of a larger key had to go, so none of that key may come in any more

    @property
    def nbytes(self) -> int:
        """Of the tensors of all calls kept."""
        return sum(kept.nbytes for kept in self.kept)

    def calls(self) -> Iterator[RecordedCall]:
        """One at a time, in order of rising key."""
        return (kept.call() for kept in self.kept)

    def offer(self, arguments: Callable[[], Mapping[str, Any] | None], key: int, group: int = 0) -> bool:
        """Whether the call was kept; only then is anything copied from its device.

        key, group: see call_key and call_group.
        arguments: by name, or None when a replay would differ from this call; asked only when the key is small enough.
        """
        self.offered += 1
        if not self.limit or key >= self._bound:
            return False
        given = arguments()
        found = None if given is None else _described(given, key, group)
        if found is None or found.nbytes > self.max_bytes:
            self.refused += 1
            return False
        trial = [*self.kept]
        insort(trial, found, key=_key)
        stays = trial.index(found) < self._fitting(trial)
        if stays:
            trial[trial.index(found)] = found.in_memory()
        self._keep(trial)
        return stays

    def merge(self, other: CallSample) -> None:
        """Add another sample in place: the smallest keys of both stay, within the larger of both limits."""
        self.limit, self.max_bytes = max(self.limit, other.limit), max(self.max_bytes, other.max_bytes)
        self.offered, self.refused = self.offered + other.offered, self.refused + other.refused
        self._bound = min(self._bound, other._bound)
        self._keep(sorted([*self.kept, *other.kept], key=_key))

    def in_memory(self) -> CallSample:
        """A copy that needs no file."""
        return self._with(kept.in_memory() for kept in self.kept)

    def to_json(self) -> dict[str, Json]:
        """Everything but the tensors."""
        return {
            "limit": self.limit,
            "max_bytes": self.max_bytes,
            "offered": self.offered,
            "refused": self.refused,
            "kept": [{"key": kept.key, "group": kept.group, "tree": kept.tree} for kept in self.kept],
        }

    @classmethod
    def from_json(
        cls,
        entry: Mapping[str, Json],
        described: Callable[[int, str], tuple[str, tuple[int, ...]]],
        fetch: Callable[[int, str], Tensor],
    ) -> CallSample:
        """described, fetch: (number of the call, path) -> (dtype code, shape), and the tensor.

        Raises ValueError, KeyError, TypeError or AttributeError when the entry is none that to_json gave.
        """
        sample = cls(int(entry["limit"]), int(entry["max_bytes"]))
        sample.offered, sample.refused = int(entry["offered"]), int(entry["refused"])
        return sample._with(
            KeptCall(
                int(kept["key"]),
                int(kept["group"]),
                kept["tree"],
                {path: described(number, path) for path in _paths(kept["tree"])},
                partial(fetch, number),
            )
            for number, kept in enumerate(entry["kept"])
        )

    def _with(self, kept: Iterable[KeptCall]) -> CallSample:
        copy = CallSample(self.limit, self.max_bytes)
        copy.kept, copy.offered, copy.refused, copy._bound = tuple(kept), self.offered, self.refused, self._bound
        return copy

    def _keep(self, calls: list[KeptCall]) -> None:
        """calls: in order of rising key. The largest go until the rest fits."""
        count = self._fitting(calls)
        self._bound = min([self._bound, *(kept.key for kept in calls[count:])])
        self.kept = tuple(calls[:count])

    def _fitting(self, calls: list[KeptCall]) -> int:
        """How many of the first calls fit."""
        total, text = 0, 0
        for number, kept in enumerate(calls):
            total, text = total + kept.nbytes, text + kept.text_bytes
            if number == self.limit or total > self.max_bytes or text > MAX_TEXT_BYTES:
                return number
        return len(calls)


# ---- arguments <-> JSON and tensors --------------------------------------------------------------------------------
class _NoTree(Exception):
    """Something in the arguments has no place in a tree."""


def _described(arguments: Mapping[str, Any], key: int, group: int = 0) -> KeptCall | None:
    """The call with the caller's own tensors, nothing copied; None when it cannot be recorded."""
    tensors: dict[str, Tensor] = {}
    try:
        tree = _to_tree(dict(arguments), (), tensors)
    except _NoTree:
        return None
    infos = {path: (TORCH_TO_CODE[tensor.dtype], tuple(tensor.shape)) for path, tensor in tensors.items()}
    found = KeptCall(key, group, tree, infos, tensors.__getitem__)
    return found if found.text_bytes <= _CALL_TEXT_BYTES else None


def _to_tree(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Json:
    """Fills `tensors` by path. Only plain types are taken: a subclass could mean more than its value."""
    kind = type(value)
    if len(path) > _DEPTH:
        raise _NoTree
    if (
        value is None
        or kind is bool
        or (kind is int and -(2**63) <= value < 2**63)
        or (kind is str and _is_unicode(value))
    ):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind in (Tensor, torch.nn.Parameter) and _is_plain(value):
        name = ".".join(part.replace("%", "%25").replace(".", "%2E") for part in path)
        tensors[name] = value
        return {"tensor": name}
    if kind in (list, tuple, torch.Size):
        entries = [_to_tree(entry, (*path, str(number)), tensors) for number, entry in enumerate(value)]
        return entries if kind is list else {"tuple": entries}
    if kind is dict and all(type(name) is str and _is_unicode(name) for name in value):
        return {"dict": {name: _to_tree(entry, (*path, name), tensors) for name, entry in value.items()}}
    raise _NoTree


def _tree_to_arguments(tree: Json, fetch: Callable[[str], Any], depth: int = 0) -> Any:
    """The inverse of _to_tree. Raises ValueError for what _to_tree never gives."""
    if depth > _DEPTH:
        raise ValueError("a recorded call is nested too deeply")
    if isinstance(tree, list):
        return [_tree_to_arguments(entry, fetch, depth + 1) for entry in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "dict" and isinstance(content, dict):
        return {name: _tree_to_arguments(entry, fetch, depth + 1) for name, entry in content.items()}
    if kind == "tuple" and isinstance(content, list):
        return tuple(_tree_to_arguments(entry, fetch, depth + 1) for entry in content)
    if kind == "float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if kind == "tensor" and isinstance(content, str):
        return fetch(content)
    raise ValueError(f"a recorded call holds {kind!r}, which is unknown")


def _paths(tree: Json) -> list[str]:
    """Of the tensors of a call, once each. Raises ValueError: it is not a call."""
    found: dict[str, None] = {}
    if not isinstance(_tree_to_arguments(tree, lambda path: found.setdefault(path)), dict):
        raise ValueError("a recorded call has no arguments by name")
    return list(found)


def _own(tensor: Tensor) -> Tensor:
    """No inference tensor: it outlives the sampling."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_nested) and tensor.dtype in TORCH_TO_CODE
    )


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _key(kept: KeptCall) -> int:
    return kept.key
