"""What stands beside a tensor of a file: tensors whose names go on where its own, or its layer's, ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..checkpoint.source import Source


@dataclass(frozen=True, slots=True)
class Neighbour:
    """end: of its name, after that of the layer or the weight. inside: it belongs to the layer: `q.x`, not `q_x`."""

    name: str
    end: str
    inside: bool

    def is_called(self, end: str) -> bool:
        """Whether its name ends so. A point or a line before the end does not matter."""
        wanted = end.lstrip("._")
        return self.end.lstrip("._") == wanted or self.name.endswith((f".{wanted}", f"._{wanted}"))


class Neighbours:
    """Of `q.weight`: `q.scale`, `q.weight.scale` and `q_scale`. Of `w1`: `w1.scale` and `w1_scale`."""

    def __init__(self, src: Source) -> None:
        self._within: dict[str, list[str]] = {}
        for name in src.tensors:
            self._within.setdefault(name.rpartition(".")[0], []).append(name)

    def of(self, name: str) -> Iterator[Neighbour]:
        layer = name.removesuffix(".weight")
        for owner in dict.fromkeys((layer, name)):
            for other in self._within.get(owner, ()):
                if other != name:
                    yield Neighbour(other, other[len(owner) + 1 :], True)
        parent, _, last = layer.rpartition(".")
        for other in self._within.get(parent, ()):
            end = other[len(parent) + 1 if parent else 0 :]
            if end.startswith(f"{last}_"):
                yield Neighbour(other, end[len(last) :], False)

    def siblings(self, name: str) -> list[str]:
        """The last parts of the names beside it in its module; [] outside of one."""
        parent, _, last = name.rpartition(".")
        ends = [other[len(parent) + 1 :] for other in self._within.get(parent, ())] if parent else []
        return [end for end in ends if end != last]
