"""The models that ComfyUI knows: which tensors of a file are linear layers, and which shapes its loaders read.

The table (architectures.json) is made from ComfyUI's own classes by tests/comfy/make_architectures.py. In its patterns
a number of a name is N; it stands there itself where layers that differ only in it are of different kinds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from ..names.file_prefixes import inner_wrappers, possible_prefixes, prefix_for_comfyui, shared_prefixes
from ..names.prefixes import WRAPPERS, unwrapped

Kind = Literal["linear", "embedding", "parameter", "conv", "gate"]
Shapes = Mapping[str, Sequence[int]]

TABLE = Path(__file__).with_name("architectures.json")
DIFFUSION_MODEL = "diffusion model"
TEXT_ENCODER = "text encoder"

# The table names modules; of the tensors that stand alone it gives the whole name.
_SUFFIX: Mapping[Kind, str] = {
    "linear": ".weight",
    "embedding": ".weight",
    "parameter": "",
    "conv": ".weight",
    "gate": ".weight",
}
_NUMBER = re.compile(r"(?<![^.])((?:block)?)\d+(?![^.])")
_PART_OF_NUMBERED = re.compile(r"(^|\.)(block)?\d+\.\w")
# A file is taken for a model when the model's classes explain this much of its weights, and it has this much of what
# ComfyUI's detection looks for. Fine-tunes add layers and leave some out; the next model explains far less.
_LEAST_EXPLAINED = 0.7
_LEAST_SIGNS = 0.5
# A part of a file may lack the signs. Then nearly all of it has to be explained, and there has to be much of it.
_ALL_EXPLAINED = 0.98
_MUCH = 8  # patterns
_AS_GOOD = 0.02  # fits that differ by less are told apart by the signs
_TRIED_PER_PATTERN = 3  # names that differ in numbers only


@dataclass(frozen=True, slots=True)
class Architecture:
    """One kind of model. Names here have no prefix.

    sort: what it is, "diffusion model" for one. comfyui: the version whose classes were read.
    runs_quantized: whether ComfyUI's loader for it reads quantized layers; not_as: types of text encoder for which it
    does not, all the same. prefix: what some of its names begin with in files, and not in ComfyUI.
    signs: {tensor: shapes}, what detection finds in all its variants. marks: alternatives; a file that has all of one
    is such a model. first: its marks come before all else.
    patterns: of tensors with two dimensions or more. shapes_read: patterns of those whose shape detection reads.
    """

    id: str
    name: str
    sort: str
    comfyui: str
    runs_quantized: bool
    not_as: tuple[str, ...]
    prefix: str
    signs: Mapping[str, tuple[str, ...]]
    marks: tuple[tuple[str, ...], ...]
    first: bool
    patterns: Mapping[str, Kind]
    shapes_read: frozenset[str]

    def kind_of(self, weight: str) -> Kind | None:
        """What the tensor is; None when the model has none of this name, or one of fewer than two dimensions."""
        own = weight.removeprefix(self.prefix)
        return next((self.patterns[pattern] for pattern in patterns_of(own) if pattern in self.patterns), None)

    def shape_read(self, weight: str) -> bool:
        """Whether ComfyUI's detection reads this tensor's shape, so that it must not be packed."""
        return any(pattern in self.shapes_read for pattern in patterns_of(weight.removeprefix(self.prefix)))


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A file's model.

    prefix: what its names begin with. inner: parts that wrappers of single blocks left inside its names.
    comfyui_finds_it: whether ComfyUI takes just that off.
    """

    architecture: Architecture
    prefix: str
    comfyui_finds_it: bool
    inner: tuple[str, ...] = ()

    def kind_of(self, weight: str) -> Kind | None:
        """As Architecture's, by the name in the file; None for the parts of a checkpoint beside the model."""
        own = self.own_name(weight)
        return None if own is None else self.architecture.kind_of(own)

    def shape_read(self, weight: str) -> bool:
        own = self.own_name(weight)
        return own is not None and self.architecture.shape_read(own)

    def own_name(self, name: str) -> str | None:
        """The name without what stands before and inside it; None for what is no part of the model."""
        own = unwrapped(name)
        return own[len(self.prefix) :] if own.startswith(self.prefix) else None


def generalise(name: str) -> str:
    """The name with N for every number between dots (`blockN` in Cosmos' names)."""
    return _NUMBER.sub(r"\1N", name)


def in_numbered_block(layer: str) -> bool:
    """Whether the layer (its name without `.weight`) is a part of something numbered: `blocks.3.attn.q`, `blocks.3.0`.

    Where the model is unknown this tells what repeats from what comes in, goes out or embeds. `mlp.0` alone is none.
    """
    return _PART_OF_NUMBERED.search(layer) is not None


def patterns_of(name: str) -> Iterator[str]:
    """Every pattern that fits the name, the most general first."""
    places = [match.span() for match in _NUMBER.finditer(name)]
    for kept in range(len(places) + 1):
        for exact in combinations(range(len(places)), kept):
            parts, end = [], 0
            for index, (start, stop) in enumerate(places):
                number = name[start:stop]
                parts += [name[end:start], number if index in exact else _NUMBER.sub(r"\1N", number)]
                end = stop
            yield "".join([*parts, name[end:]])


@cache
def architectures() -> tuple[Architecture, ...]:
    """The table."""
    return tuple(_architecture(entry) for entry in json.loads(TABLE.read_text("utf-8"))["architectures"])


def recognise(tensors: Shapes) -> KnownModel | None:
    """The model that a file's tensors are of, by their names and shapes (as they would be when decoded).

    Of a whole checkpoint it is the diffusion model. None when it is none of the table's; most models under diffusers'
    names are none.
    """
    inner = inner_wrappers(tensors)
    plain = {unwrapped(name): shape for name, shape in tensors.items()} if inner else tensors
    known = _behind(plain, possible_prefixes(plain))
    if known is None:
        known = _behind(plain, shared := shared_prefixes(list(plain)), any_sort=frozenset(shared))
    return replace(known, inner=inner, comfyui_finds_it=False) if known is not None and inner else known


def _behind(tensors: Shapes, prefixes: Sequence[str], any_sort: frozenset[str] = frozenset()) -> KnownModel | None:
    """any_sort: prefixes behind which there may be a model of any sort, besides those of wrappers."""
    by_prefix = {prefix: _own(tensors, prefix) for prefix in prefixes}
    plain = {prefix: own for prefix, own in by_prefix.items() if prefix in any_sort or _only_wrappers(prefix)}
    return (
        _by_marks(plain, first=True)
        or _best_fit(tensors, by_prefix)
        or _by_marks(plain, sort=TEXT_ENCODER)
        or _by_marks(plain)
    )


def _own(tensors: Shapes, prefix: str) -> dict[str, Sequence[int]]:
    return {name[len(prefix) :]: shape for name, shape in tensors.items() if name.startswith(prefix)}


def _only_wrappers(prefix: str) -> bool:
    """Not a prefix of ComfyUI's: names of text encoders begin with `model.` themselves."""
    rest = prefix
    while rest:
        part = next((part for part in WRAPPERS if rest.startswith(part)), None)
        if part is None:
            return False
        rest = rest[len(part) :]
    return True


def _by_marks(by_prefix: Mapping[str, Shapes], *, first: bool = False, sort: str | None = None) -> KnownModel | None:
    """The first of the table whose marks a file has. first: of those that would be taken for a diffusion model."""
    for prefix, own in by_prefix.items():
        for known in architectures():
            wanted = known.first >= first and sort in (None, known.sort)
            if wanted and any(all(_has(own, mark) for mark in marks) for marks in known.marks):
                return KnownModel(known, prefix, not prefix)
    return None


def _has(tensors: Shapes, mark: str) -> bool:
    """mark: a tensor's name; its shape follows (`10240x*`) where that counts, and ! stands before what must lack."""
    if mark.startswith("!"):
        return mark[1:] not in tensors
    name, _, shape = mark.partition(" ")
    return name in tensors and (not shape or _fits(tensors[name], shape))


def _fits(shape: Sequence[int], wanted: str) -> bool:
    sizes = wanted.split("x")
    return len(sizes) == len(shape) and all(size in ("*", str(n)) for size, n in zip(sizes, shape, strict=True))


@dataclass(frozen=True, slots=True)
class _Fit:
    """How well a model explains a file. Shares: of the file's weights, of what detection looks for, of the shapes of
    that, and of the model's own patterns."""

    explained: float
    signs: float
    shapes: float
    complete: float


def _best_fit(tensors: Shapes, by_prefix: Mapping[str, Shapes]) -> KnownModel | None:
    fits: list[tuple[_Fit, Architecture, str]] = []
    for prefix, own in by_prefix.items():
        sample = _sample(own)
        for known in architectures():
            fit = _fit(known, own, sample) if known.sort == DIFFUSION_MODEL else None
            if fit is not None:
                fits.append((fit, known, prefix))
    if not fits:
        return None
    most = max(fit.explained for fit, _, _ in fits)
    good = [entry for entry in fits if entry[0].explained >= most - _AS_GOOD]
    _, known, prefix = max(good, key=lambda entry: (entry[0].signs, entry[0].shapes, entry[0].complete))
    return KnownModel(known, prefix, prefix == prefix_for_comfyui(tensors))


def _sample(own: Shapes) -> list[tuple[str, int]]:
    """(name, dimensions) of the weights, a few of those that differ only in numbers."""
    seen: dict[str, int] = {}
    sample = []
    for name, shape in own.items():
        if name.endswith(".weight") and len(shape) >= 2:
            pattern = generalise(name)
            seen[pattern] = seen.get(pattern, 0) + 1
            if seen[pattern] <= _TRIED_PER_PATTERN:
                sample.append((name, len(shape)))
    return sample


def _fit(known: Architecture, own: Shapes, sample: Sequence[tuple[str, int]]) -> _Fit | None:
    """None where the file is not such a model."""
    explained = {name for name, dimensions in sample if _may_have(known.kind_of(name), dimensions)}
    if len(explained) < max(1, _LEAST_EXPLAINED * len(sample)):
        return None
    found = {sign: _in_file(known, own, sign) for sign in known.signs}
    signs = sum(shape is not None for shape in found.values()) / len(found) if found else 1.0
    present = {generalise(name) for name in explained}
    share = len(explained) / len(sample)
    if signs < _LEAST_SIGNS and (share < _ALL_EXPLAINED or len(present) < _MUCH):
        return None
    same = sum("x".join(map(str, shape or ())) in known.signs[sign] for sign, shape in found.items())
    every = {generalise(pattern) for pattern in known.patterns}
    return _Fit(share, signs, same / max(1, len(found)), len(present & every) / max(1, len(every)))


def _in_file(known: Architecture, own: Shapes, name: str) -> Sequence[int] | None:
    return own.get(name, own.get(known.prefix + name))


def _may_have(kind: Kind | None, dimensions: int) -> bool:
    if kind is None or kind == "parameter":
        return kind is not None
    return dimensions > 2 if kind == "conv" else dimensions == 2


def _architecture(entry: dict[str, Any]) -> Architecture:
    return Architecture(
        id=entry["id"],
        name=entry["name"],
        sort=entry["sort"],
        comfyui=entry["comfyui"],
        runs_quantized=entry["runs_quantized"],
        not_as=tuple(entry.get("not_as", ())),
        prefix=entry.get("prefix", ""),
        signs={name: tuple(shapes) for name, *shapes in (sign.split(" ") for sign in entry.get("signs", ()))},
        marks=tuple(tuple(marks) for marks in entry.get("marks", ())),
        first=entry.get("first", False),
        patterns={pattern + suffix: kind for kind, suffix in _SUFFIX.items() for pattern in entry.get(kind, ())},
        shapes_read=frozenset(entry.get("shape_read", ())),
    )
