"""Which rows of a call are looked at: seeded, balanced over the call's chunks, the same for every layer."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..recipe import layer_generator
from .reservoir import draw_keys


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Rows of one chunk of a call, as indices into the flattened input: int64, on the CPU, disjoint.

    fit: for the statistics. held: for judging, with their keys (reservoir.py).
    """

    label: str
    weight: float
    fit: Tensor
    held: Tensor
    keys: Tensor


def chunk_labels(shape: Sequence[int], labels: Sequence[str]) -> tuple[str, ...]:
    """The labels of an input's equal chunks along dimension 0.

    () where they cannot be told apart: dimension 0 is no multiple of them, or it is the only one besides the channels
    and holds tokens. An input [B, K] with B = len(labels) does count as a batch.
    """
    if len(labels) <= 1:
        return tuple(labels)
    if len(shape) < 2 or shape[0] % len(labels):
        return ()
    return tuple(labels)


def select_rows(rows: int, chunks: Sequence[tuple[str, float, int]], holdout: float, seed: int,
                key: str) -> tuple[ChunkRows, ...]:
    """rows: of the flattened input, split equally among chunks = (label, weight, most rows to take).

    holdout: share of the taken rows that is kept for judging, rounded up or down by lot. key: with the seed, all that
    the draw depends on. A chunk of weight 0 or quota 0 takes none.
    """
    generator = layer_generator(seed, key)
    size = rows // len(chunks)
    result = []
    for number, (label, weight, most) in enumerate(chunks):
        order = torch.randperm(size, generator=generator)[:most if weight > 0 else 0] + number * size
        lot = float(torch.rand((), generator=generator))
        held = int(len(order) * holdout + lot)
        keys = draw_keys(held, weight, generator) if held else torch.empty(0)
        # In rising order the rows of one picture lie together: sorted reads are kinder to memory.
        result.append(ChunkRows(label, weight, order[held:].sort().values, order[:held], keys))
    return tuple(result)
