"""The two grid points next to every weight, a slice of rows at a time, and which of the two each weight takes.

For the whole layer at once the points would be two copies of the weight, and what computes them ten. A choice is one
bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats.base import Format
from ...formats.slices import encode_rows, tile
from ...numerics.scales import QParams
from ...numerics.slices import row_slices

# Weights in a slice: at least so many, so that a GPU has enough to do; on a CPU at most so many, to stay in its cache.
FEWEST, _MOST_ON_CPU = 1 << 18, 1 << 19
_OWN_CODEBOOK = 3  # a format with a codebook in the file brackets through 16 levels for every weight: smaller slices


@dataclass(frozen=True, slots=True)
class Neighbours:
    """work: float32 [Np, Kp]. qp: the scales that the grid comes from."""

    fmt: Format
    work: Tensor
    qp: QParams

    @property
    def shape(self) -> tuple[int, int]:
        return self.work.shape[0], self.work.shape[1]

    def slices(self, parts: int) -> list[slice]:
        """About `parts` slices of whole block rows, fewer in a small layer. Only shape and device type count."""
        parts = parts if self.qp.codebook is None else parts * _OWN_CODEBOOK
        weights = max(FEWEST, self.work.numel() // parts)
        weights = weights if self.work.is_cuda else min(weights, _MOST_ON_CPU)
        return list(row_slices(self.shape, weights, self.fmt.block_rows))

    def _part(self, rows: slice) -> tuple[Tensor, QParams]:
        return self.work[rows], tile(self.fmt, self.qp, self.shape, rows, slice(0, self.shape[1]))

    def bracket(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(low, high), float32: low <= weight <= high, equal on the grid and beyond its ends."""
        part, qp = self._part(rows)
        return self.fmt.bracket_columns(part, qp, 0, (part.shape[0], part.shape[1]))

    def nearest_error(self, rows: slice) -> Tensor:
        """Round-to-nearest minus weight, float32."""
        part, qp = self._part(rows)
        return self.fmt.round(part, qp).sub_(part)

    def rounded(self, choice: Choice) -> Tensor:
        """float32 [Np, Kp], on the grid."""
        whole = torch.empty_like(self.work)
        for rows, bits in zip(choice.slices, choice.bits, strict=True):
            whole[rows] = self._chosen(rows, bits)
        return whole

    def encode(self, choice: Choice | None) -> Tensor:
        """The codes of a choice; None: those of rounding to nearest."""
        if choice is None:
            return encode_rows(self.fmt, self.work, self.qp)
        return torch.cat(
            [
                self.fmt.encode(self._chosen(rows, bits), self._part(rows)[1])
                for rows, bits in zip(choice.slices, choice.bits, strict=True)
            ]
        )

    def _chosen(self, rows: slice, bits: Tensor) -> Tensor:
        low, high = self.bracket(rows)
        return torch.where(unpack_bits(bits, low.numel()).view(low.shape), high, low)


@dataclass(frozen=True, slots=True)
class Choice:
    """bits[i]: for the weights of slices[i], packed by pack_bits; set: the weight takes its upper neighbour."""

    slices: list[slice]
    bits: list[Tensor]


def pack_bits(flags: Tensor) -> Tensor:
    """bool, any shape -> uint8 [ceil(numel / 8)]."""
    flat = flags.flatten()
    eights = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The inverse of pack_bits: bool [count]."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> places) & 1).flatten()[:count].bool()
