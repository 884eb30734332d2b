"""Which weights a format takes, and how they are padded and divided among scales: pure functions of the shape."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass, replace
from typing import TypeVar

from ..errors import RequestError
from ..numerics.scales import Granularity, given
from .records import Element

Self = TypeVar("Self", bound="BlockGeometry")


@dataclass(frozen=True, kw_only=True)
class BlockGeometry(ABC):
    """pad_to: N and K of the work weight are padded with zeros to multiples of this.

    group_sizes, rotations: what a user may choose. k_multiple: of which K has to be a multiple besides.
    """

    name: str
    element: Element
    granularity: Granularity
    group_size: int | None = None
    group_sizes: tuple[int, ...] = ()
    rotation: int | None = None
    rotations: tuple[int, ...] = ()
    pad_to: int = 1
    k_multiple: int = 1

    def with_options(self: Self, group_size: int | None = None, rotation: int | None = None) -> Self:
        """The same format with another group size or rotation group; RequestError when it does not offer that."""
        fmt = self
        if group_size is not None:
            fmt = replace(fmt, group_size=self._offered("group_size", group_size, self.group_sizes))
        if rotation is not None:
            fmt = replace(fmt, rotation=self._offered("rotation", rotation, self.rotations))
        return fmt

    def _offered(self, field: str, value: int, offered: tuple[int, ...]) -> int:
        if value not in offered:
            rest = (
                f"Choose one of {', '.join(map(str, offered))}." if offered else "This format has none: leave it out."
            )
            raise RequestError(f"{value} is not offered by {self.name}. {rest}", field)
        return value

    def for_shape(self: Self, shape: tuple[int, ...]) -> Self:
        """The variant that fits a weight of this shape (a smaller rotation group, say); see `problem` first."""
        if self.rotation is None or shape[1] % self.rotation == 0:
            return self
        fitting = [r for r in self.rotations if r < self.rotation and shape[1] % r == 0]
        return replace(self, rotation=max(fitting)) if fitting else self

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored so, as a phrase; None when it can."""
        if len(shape) != 2 or 0 in shape:
            return f"the weight has shape {list(shape)}, {self.name} needs two dimensions, none of them 0"
        n, k = shape
        fmt = self.for_shape(shape)
        if n % fmt.block_rows:
            return f"out_features={n} is not a multiple of group_size {fmt.block_rows} ({self.name})"
        needs = [
            ("group_size ", fmt.group_size if self.pad_to == 1 else None),
            ("rotation group ", fmt.rotation),
            ("", self.k_multiple),
        ]
        for what, multiple in needs:
            if multiple and k % multiple:
                return f"in_features={k} is not a multiple of {what}{multiple} ({self.name})"
        return None

    def work_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        pad = self.pad_to
        return (shape[0] + pad - 1) // pad * pad, (shape[1] + pad - 1) // pad * pad

    def block(self, work_shape: tuple[int, int]) -> tuple[int, int]:
        return self.granularity.block(work_shape, self.group_size)

    def scale_grid(self, work_shape: tuple[int, int]) -> tuple[int, int]:
        return self.granularity.grid(work_shape, self.group_size)

    @property
    def group(self) -> int:
        """group_size, of a format that has one."""
        return given(self.group_size)

    @property
    def block_rows(self) -> int:
        """How many rows a tile of the weight has that shares a scale; 1 where it is not divided into tiles."""
        return self.block((0, 0))[0] if self.granularity is Granularity.BLOCK else 1

    @property
    def row_multiple(self) -> int:
        """Slices of rows that begin at multiples of this are quantized and stored on their own."""
        return self.block_rows

    @property
    def smallest_shape(self) -> tuple[int, int]:
        """[N, K] of the smallest weight that the format takes."""
        group = self.group_size if self.group_size is not None and self.pad_to == 1 else 1
        per_byte = 8 // self.element.bits if self.pad_to == 1 else 1
        return self.block_rows, math.lcm(group, self.rotation or 1, self.k_multiple, per_byte)
