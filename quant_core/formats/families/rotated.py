"""Formats whose weights are rotated before rounding (ConvRot), and whose runtime rotates the inputs the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from ..base import Format

Self = TypeVar("Self", bound="RotatedFormat")


@dataclass(frozen=True, kw_only=True)
class RotatedFormat(Format):
    """`convrot_groupsize` in the JSON tells the rotation group."""

    def accepts(self: Self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Self | None:
        fmt, recorded = super().accepts(config, shapes), config.get("convrot_groupsize")
        return replace(fmt, rotation=int(recorded)) if fmt is not None and recorded else fmt

    def runtime_params(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**super().runtime_params(tensors), "convrot_groupsize": self.rotation}
