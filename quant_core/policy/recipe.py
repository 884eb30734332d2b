"""A recipe says how one layer is quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..algorithms.choosers import CHOOSER_OPTIONS, CHOOSERS
from ..algorithms.evidence import Evidence
from ..algorithms.options import check_known
from ..algorithms.residual import ResidualOptions
from ..algorithms.rounders import ROUNDER_OPTIONS, ROUNDERS
from ..errors import RequestError
from ..formats.base import Format

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Recipe:
    """format: a Format with its options set. scales: a chooser's name. rounding: a rounder's name.

    "auto" for either is decided per layer by what is known of its inputs (`resolve`).
    seed: drives every random choice, together with the layer's name, so that layers are independent of order.
    options: the algorithms' own settings, JSON values, checked by `validate`.
    """

    format: Format
    scales: str = "absmax"
    rounding: str = "nearest"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """RequestError when an algorithm's name or an option is unknown, or an option's value does not fit."""
        for what, name, known in (("scales", self.scales, CHOOSERS), ("rounding", self.rounding, ROUNDERS)):
            if name != AUTO and name not in known:
                raise RequestError(f"there is no {what} method {name!r}. Choose one of {', '.join((AUTO, *known))}.")
        check_known(self.options, (*CHOOSER_OPTIONS, *ROUNDER_OPTIONS, ResidualOptions))

    def resolve(self, evidence: Evidence) -> tuple[str, str]:
        """(scales, rounding) for a layer with this evidence, "auto" replaced.

        gptq where there is a Hessian, nearest without; scales are searched in both cases.
        """
        rounding = self.rounding
        if rounding == AUTO:
            rounding = "nearest" if evidence.hessian is None else "gptq"
        return ("search" if self.scales == AUTO else self.scales), rounding

    def describe(self) -> dict[str, Any]:
        """JSON object for the file's header and the report."""
        fmt = self.format
        described: dict[str, Any] = {
            "format": fmt.name,
            "scales": self.scales,
            "rounding": self.rounding,
            "seed": self.seed,
        }
        if fmt.group_sizes:
            described["group_size"] = fmt.group_size
        if fmt.rotation is not None:
            described["rotation"] = fmt.rotation
        return described | ({"options": dict(self.options)} if self.options else {})
