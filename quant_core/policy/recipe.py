"""A recipe says how one layer is quantized; evidence is what is known of its inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..formats.base import Format

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What calibration knows of a layer's inputs x [rows, K]. Every field may be missing.

    hessian: float32 [K, K], X^T X / rows. hessian_diagonal: float32 [K], the mean square per channel.
    mean: float32 [K]. absmax: float32 [K]. rows: bf16 or float32 [R, K], held out, for judging only.
    count: how many rows were seen. centre: the Hessian and its diagonal count without the mean, as make_objective takes them.
    """

    hessian: Tensor | None = None
    hessian_diagonal: Tensor | None = None
    mean: Tensor | None = None
    absmax: Tensor | None = None
    rows: Tensor | None = None
    count: int = 0
    centre: bool = False

    def centred(self) -> Evidence:
        """Of x - mean: what counts once the bias has taken up the mean error."""
        return replace(self, centre=True)


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
        from ..algorithms.choosers import CHOOSER_OPTIONS, CHOOSERS
        from ..algorithms.options import check_known
        from ..algorithms.residual import ResidualOptions
        from ..algorithms.rounders import ROUNDER_OPTIONS, ROUNDERS

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


def layer_generator(seed: int, layer: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the seed and the layer's name only."""
    import hashlib

    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
