"""One layer, many names: what files, LoRAs and lists call the layers of a model, resolved against the model itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import RequestError
from .diffusers_layers import aliases
from .layer_cuts import Cut
from .prefixes import UNDERSCORE_PREFIXES, strip_prefix

_OUT = ".to_out.0"  # some tools leave the number out


@dataclass(frozen=True, slots=True)
class Place:
    """A layer as the model names it, and which of its rows the other name stands for."""

    layer: str
    cut: Cut = Cut.ALL


class LayerNames:
    """Finds a model's layer by any of its names. names: the layers as the model's file or module tree has them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._exact = {name: Place(name) for name in names}
        self._dotted: dict[str, dict[str, Place]] = {}
        self._joined: dict[str, dict[str, Place]] = {}
        own: dict[str, list[str]] = {}
        for name in self._exact:
            own.setdefault(strip_prefix(name), []).append(name)
        for alias, layers in own.items():
            for name in layers:
                self._learn(alias, Place(name))
        taken = set(own), set(self._joined)
        for layer, other in aliases(own):
            shorter = [other.name.removesuffix(".0")] if other.name.endswith(_OUT) else []
            for alias in (other.name, *shorter):
                for name in own[layer]:
                    self._learn(alias, Place(name, other.cut), taken)
        for layer in own:
            for name in own[layer] if layer.endswith(_OUT) else ():
                self._learn(layer.removesuffix(".0"), Place(name), taken)

    def _learn(self, alias: str, place: Place, taken: tuple[set[str], set[str]] = (set(), set())) -> None:
        """taken: names that layers have themselves. They are not given to others."""
        joined = alias.replace(".", "_")
        for table, key, known in ((self._dotted, alias, taken[0]), (self._joined, joined, taken[1])):
            if key not in known:
                table.setdefault(key, {}).setdefault(place.layer, place)

    def find(self, name: str) -> Place | None:
        """The layer of the model that this is a name of, None when it has no such layer.

        RequestError when the name fits several layers.
        """
        if name in self._exact:
            return self._exact[name]
        found = self._dotted.get(strip_prefix(name), {})
        prefixes = iter([prefix for prefix in UNDERSCORE_PREFIXES if name.startswith(prefix)])
        while not found and (prefix := next(prefixes, None)) is not None:
            found = self._joined.get(name[len(prefix) :], {})
        if len(found) > 1:
            raise RequestError(f"the name {name!r} fits several layers: {', '.join(found)}. Rename it to one of them.")
        return next(iter(found.values()), None)

    def resolve(self, name: str) -> str | None:
        """The model's own name of the layer; see `find`."""
        place = self.find(name)
        return place.layer if place else None
