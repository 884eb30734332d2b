"""A recipe says how one layer is quantized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..algorithms import choosers, rounders
from ..algorithms.auto import AUTO, AutoRounding, AutoScales
from ..algorithms.choosers import Chooser
from ..algorithms.choosers.absmax import Absmax
from ..algorithms.choosers.search import Search
from ..algorithms.evidence import Evidence
from ..algorithms.options import JsonOptions, Settings, check_options, parse_settings
from ..algorithms.residual import LowRank
from ..algorithms.rounders import Rounder
from ..algorithms.rounders.gptq import Gptq
from ..algorithms.rounders.nearest import Nearest
from ..errors import RequestError
from ..formats.base import Format

# What a user can name, in the order in which it is offered.
SCALES: dict[str, type[Chooser]] = {AUTO: AutoScales, **choosers.CHOOSERS}
ROUNDING: dict[str, type[Rounder]] = {AUTO: AutoRounding, **rounders.ROUNDERS}
_SETTINGS: tuple[type[Settings], ...] = (*choosers.ALL, *rounders.ALL, LowRank)


@dataclass(frozen=True, slots=True)
class Recipe:
    """format: a Format with its options set. scales, rounding: the algorithms, their settings with them.

    seed: drives every random choice, together with the layer's name, so that layers are independent of order.
    residual: the low-rank part that is written beside the model. asked: the options as the user gave them, which the
    file's header keeps in the user's own spelling, those of algorithms that do not run included.
    """

    format: Format
    scales: Chooser = Absmax()
    rounding: Rounder = Nearest()
    seed: int = 0
    residual: LowRank = LowRank()
    asked: JsonOptions = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether it is round-to-nearest with absmax scales, whatever is known of a layer."""
        return isinstance(self.scales, Absmax) and isinstance(self.rounding, Nearest)

    @property
    def options(self) -> dict[str, Any]:
        """The settings as JSON: those that were asked for, and all others that are not at their defaults."""
        found = dict(self.asked)
        for part in (self.scales, self.rounding, self.residual):
            for option, value, default in part.options():
                if found.get(option, default) != value:
                    found[option] = value
        return found

    def resolve(self, evidence: Evidence) -> Recipe:
        """The recipe for a layer with this evidence, "auto" replaced by the algorithms that run."""
        return replace(self, scales=self.scales.resolve(evidence), rounding=self.rounding.resolve(evidence))

    def with_methods(self, scales: str, rounding: str) -> Recipe:
        """With algorithms of these names. They take their settings from the options of this recipe. RequestError."""
        return parse_recipe(self.format, scales, rounding, self.seed, self.options)

    def describe(self) -> dict[str, Any]:
        """JSON object for the file's header and the report."""
        fmt, options = self.format, self.options
        described: dict[str, Any] = {
            "format": fmt.name,
            "scales": self.scales.name,
            "rounding": self.rounding.name,
            "seed": self.seed,
        }
        if fmt.group_sizes:
            described["group_size"] = fmt.group_size
        if fmt.rotation is not None:
            described["rotation"] = fmt.rotation
        return described | ({"options": options} if options else {})


def parse_recipe(
    fmt: Format,
    scales: str = Absmax.name,
    rounding: str = Nearest.name,
    seed: int = 0,
    options: JsonOptions | None = None,
) -> Recipe:
    """A recipe from the names of its algorithms and from their settings, as users give them.

    "auto" for either is decided per layer by what is known of its inputs (`Recipe.resolve`). options: of any
    algorithm; those of an algorithm that does not run are checked too. RequestError: there is no such algorithm or
    option, or an option does not take the value.
    """
    asked = dict(options or {})
    _check_name("scales", scales, SCALES)
    _check_name("rounding", rounding, ROUNDING)
    check_options(asked, _SETTINGS)
    chooser = AutoScales(parse_settings(Search, asked)) if scales == AUTO else parse_settings(SCALES[scales], asked)
    rounder = (
        AutoRounding(parse_settings(Gptq, asked)) if rounding == AUTO else parse_settings(ROUNDING[rounding], asked)
    )
    return Recipe(fmt, chooser, rounder, seed, parse_settings(LowRank, asked), asked)


def _check_name(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise RequestError(f": there is no method {name!r}. Choose one of {', '.join(known)}.", what)
