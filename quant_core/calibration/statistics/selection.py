"""Which rows of a call are looked at: seeded, balanced over the call's chunks, the same for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...algorithms.task import layer_generator
from .reservoir import draw_keys


@dataclass(frozen=True, slots=True)
class Part:
    """A run of chosen rows: `count` of them, of one chunk.

    keys: of rows held out for judging (reservoir.py), else None.
    """

    label: str
    weight: float
    count: int
    keys: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """Rows of a call, as indices into the flattened input: int64, on the CPU, none twice. parts: in their order."""

    index: Tensor
    parts: tuple[Part, ...]


def chunk_labels(shape: Sequence[int], labels: Sequence[str]) -> tuple[str, ...]:
    """The labels of an input's equal chunks along dimension 0.

    () where they cannot be told apart: dimension 0 is not a multiple of them, or it is the only one besides the
    channels and holds tokens. An input [B, K] with B = len(labels) does count as a batch.
    """
    if len(labels) <= 1:
        return tuple(labels)
    if len(shape) < 2 or shape[0] % len(labels):
        return ()
    return tuple(labels)


def select_rows(rows: int, chunks: Sequence[tuple[str, float, int]], holdout: float, seed: int, key: str) -> Chosen:
    """rows: of the flattened input, split equally among chunks = (label, weight, most rows to take).

    holdout: share of the taken rows that is kept for judging, rounded up or down by lot. key: with the seed, all that
    the draw depends on. A chunk of weight 0 or quota 0 takes none. First the rows to fit, then those held out.
    """
    generator = layer_generator(seed, key)
    size = rows // len(chunks)
    fitted, held = [], []
    for number, (label, weight, most) in enumerate(chunks):
        order = torch.randperm(size, generator=generator, device="cpu")[: most if weight > 0 else 0] + number * size
        count = int(len(order) * holdout + float(torch.rand((), generator=generator, device="cpu")))
        # In rising order the rows of one picture lie together: sorted reads are kinder to memory.
        fitted.append((order[count:].sort().values, Part(label, weight, len(order) - count)))
        held.append(
            (order[:count], Part(label, weight, count, draw_keys(count, weight, generator) if count else None))
        )
    taken = [(index, part) for index, part in fitted + held if part.count]
    return Chosen(
        torch.cat([index for index, _ in taken]) if taken else torch.empty(0, dtype=torch.int64, device="cpu"),
        tuple(part for _, part in taken),
    )
