"""The kinds of adapters that a LoRA file can hold, and the change each makes to a weight.

Every kind gives what ComfyUI gives for it: LoRA (with a core tensor and as DoRA), LoHa, LoKr, GLoRA, OFT, BOFT, and
differences. All math is float32. Source of the formulas: LyCORIS and the papers it names; where ComfyUI departs from
them, what it does counts, because that is what users of the file have seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.source import Source
from ..names.lora_parts import Kind

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Factors:
    """The tensors of one layer in a LoRA. names: {part: tensor}. alpha: None where the file gives none."""

    src: Source
    names: Mapping[str, str]
    alpha: float | None = None

    def shape(self, part: str) -> Shape:
        return self.src.tensors[self.names[part]].shape

    def read(self, part: str) -> Tensor:
        return self.src.read(self.names[part]).to(torch.float32)

    def flat(self, part: str) -> Tensor:
        """As a matrix: [first, all others]."""
        return self.read(part).flatten(1)

    def scale(self, rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / rank


class Adapter(ABC):
    """One kind. needs: its parts. may: further parts that it reads. Of factors with missing parts ask nothing else."""

    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()

    def missing(self, names: Collection[str]) -> str | None:
        """A part that has to be there and is not."""
        return next((part for part in self.needs if part not in names), None)

    def rank(self, factors: Factors, weight: Shape) -> int | None:
        """What alpha is divided by; None where alpha does not scale. 0: it changes nothing."""
        return None

    @abstractmethod
    def makes(self, factors: Factors, weight: Shape) -> Shape | None:
        """(rows, columns) of the change; None when the factors do not fit each other or the weight. Shapes only."""

    @abstractmethod
    def delta(self, factors: Factors, weight: Tensor, strength: float) -> Tensor:
        """float32 [rows, columns], without alpha. weight: float32, what it is added to."""


def flat_shape(shape: Shape) -> Shape:
    """Rows and columns; [N, K, 1, 1] is [N, K], a vector [N] is [N, 1]."""
    return shape[0], torch.Size(shape[1:]).numel()


def _product(left: Shape, right: Shape) -> Shape | None:
    """The shape of left @ right, both flattened to matrices; None when they do not fit."""
    (n, r), (q, k) = flat_shape(left), flat_shape(right)
    return (n, k) if r == q else None


def _cored(core: Shape, left: Shape, right: Shape) -> Shape | None:
    """The shape of left @ core @ right per kernel position. left: [N, i], core: [i, j, ...], right: [j, K]."""
    fits = len(core) >= 2 and flat_shape(left)[1] == core[0] and core[1] == right[0]
    return (left[0], flat_shape(right)[1] * torch.Size(core[2:]).numel()) if fits else None


class LowRank(Adapter):
    """up @ down, with a core between them where the file has one (a convolution's `lora_mid`)."""

    needs, may = ("down", "up"), ("mid", "dora_scale", "reshape_weight", "up_bias")

    def rank(self, factors: Factors, weight: Shape) -> int | None:
        return factors.shape("down")[0]

    def makes(self, factors: Factors, weight: Shape) -> Shape | None:
        up, down = factors.shape("up"), factors.shape("down")
        if "mid" in factors.names:
            return _cored(factors.shape("mid"), up, down)
        return _product(up, down)

    def delta(self, factors: Factors, weight: Tensor, strength: float) -> Tensor:
        up, down = factors.flat("up"), factors.flat("down")
        if "mid" in factors.names:
            return torch.einsum("ni,ij...,jk->nk...", up, factors.read("mid"), down).flatten(1)
        return up @ down


class LoHa(Adapter):
    """The product, element by element, of two low-rank matrices."""

    needs, may = ("w1_a", "w1_b", "w2_a", "w2_b"), ("t1", "t2", "dora_scale")

    def rank(self, factors: Factors, weight: Shape) -> int | None:
        return factors.shape("w1_b")[0]

    def makes(self, factors: Factors, weight: Shape) -> Shape | None:
        if ("t1" in factors.names) != ("t2" in factors.names):
            return None
        one, two = (self._side(factors, side) for side in "12")
        return one if one == two else None

    def _side(self, factors: Factors, side: str) -> Shape | None:
        a, b = factors.shape(f"w{side}_a"), factors.shape(f"w{side}_b")
        return _cored(factors.shape(f"t{side}"), a[::-1], b) if "t1" in factors.names else _product(a, b)

    def delta(self, factors: Factors, weight: Tensor, strength: float) -> Tensor:
        sides = []
        for side in "12":
            a, b = factors.flat(f"w{side}_a"), factors.flat(f"w{side}_b")
            core = factors.read(f"t{side}") if "t1" in factors.names else None
            sides.append(a @ b if core is None else torch.einsum("in,ij...,jk->nk...", a, core, b).flatten(1))
        return sides[0] * sides[1]


class LoKr(Adapter):
    """The Kronecker product of w1 and w2, each whole or as two factors; w2 with a core where it is a convolution's."""

    may = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2", "dora_scale")

    def missing(self, names: Collection[str]) -> str | None:
        halves = [half for side in ("w1", "w2") if side not in names for half in (f"{side}_a", f"{side}_b")]
        return next((half for half in halves if half not in names), None)

    def rank(self, factors: Factors, weight: Shape) -> int | None:
        ranks = [factors.shape(f"{side}_b")[0] for side in ("w2", "w1") if side not in factors.names]
        return ranks[0] if ranks else None

    def makes(self, factors: Factors, weight: Shape) -> Shape | None:
        one, two = self._side(factors, "w1"), self._side(factors, "w2")
        return (one[0] * two[0], one[1] * two[1]) if one and two else None

    def _side(self, factors: Factors, side: str) -> Shape | None:
        if side in factors.names:
            return flat_shape(factors.shape(side))
        a, b = factors.shape(f"{side}_a"), factors.shape(f"{side}_b")
        return _cored(factors.shape("t2"), a[::-1], b) if side == "w2" and "t2" in factors.names else _product(a, b)

    def delta(self, factors: Factors, weight: Tensor, strength: float) -> Tensor:
        one = factors.flat("w1") if "w1" in factors.names else factors.flat("w1_a") @ factors.flat("w1_b")
        if "w2" in factors.names:
            two = factors.read("w2")
        elif "t2" in factors.names:
            two = torch.einsum("in,ij...,jk->nk...", factors.flat("w2_a"), factors.read("t2"), factors.flat("w2_b"))
        else:
            two = factors.flat("w2_a") @ factors.flat("w2_b")
        return torch.kron(one.reshape(*one.shape, *[1] * (two.dim() - 2)), two.contiguous()).flatten(1)


class GLoRA(Adapter):
    """A low-rank matrix beside the weight, and one behind it: W a + b.

    LyCORIS changed the order of the factors; the shapes tell which one it is.
    """

    needs, may = ("a1", "a2", "b1", "b2"), ("dora_scale",)

    def _old(self, factors: Factors, weight: Shape) -> bool:
        a1, a2, b1, b2 = (factors.shape(part) for part in self.needs)
        if not b2[1] == b1[0] == a1[0] == a2[1]:
            return False
        new = b2[0] == b1[1] == a1[1] == a2[0]
        return not new or a2[0] == weight[0] == weight[1]

    def rank(self, factors: Factors, weight: Shape) -> int | None:
        return factors.shape("a1" if self._old(factors, weight) else "a2")[0]

    def makes(self, factors: Factors, weight: Shape) -> Shape | None:
        if len(weight) < 2:
            return None
        a1, a2, b1, b2 = (factors.shape(part) for part in self.needs)
        old = self._old(factors, weight)
        behind = _product(a2, a1) if old else _product(a1, a2)
        columns = flat_shape(weight)[1] if old else weight[1]
        return (_product(b2, b1) if old else _product(b1, b2)) if behind == (columns, columns) else None

    def delta(self, factors: Factors, weight: Tensor, strength: float) -> Tensor:
        a1, a2, b1, b2 = (factors.flat(part) for part in self.needs)
        if self._old(factors, tuple(weight.shape)):
            return b2 @ b1 + weight.flatten(1) @ a2 @ a1
        behind = torch.einsum("oi...,ij->oj...", torch.einsum("oi...,ij->oj...", weight, a1), a2)
        return behind.flatten(1) + b1 @ b2


class Oft(Adapter):
    """A rotation of the rows in blocks [blocks, b, b], or (BOFT) several rotations of rows further and further apart.

    alpha bounds how far they turn. ComfyUI multiplies by the strength twice, and so do we.
    """

    needs, may = ("oft_blocks",), ("rescale",)

    def makes(self, factors: Factors, weight: Shape) -> Shape | None:
        blocks = factors.shape("oft_blocks")
        if len(weight) < 2 or len(blocks) not in (3, 4) or 0 in blocks:
            return None
        rows, size = blocks[-3] * blocks[-1], blocks[-1]
        steps = blocks[0] if len(blocks) == 4 else 0
        fits = blocks[-2] == size and (not steps or (size % 2 == 0 and rows % (size << (steps - 1)) == 0))
        scales = "rescale" not in factors.names or torch.Size(factors.shape("rescale")).numel() == weight[0]
        return (rows, flat_shape(weight)[1]) if fits and scales else None

    def _rotations(self, factors: Factors) -> Tensor:
        """Cayley's transform of the skew part of the blocks: orthogonal, [..., b, b]."""
        blocks = factors.read("oft_blocks")
        eye = torch.eye(blocks.shape[-1])
        q = blocks - blocks.transpose(-1, -2)
        norm = torch.norm(q) + 1e-8
        if factors.alpha is not None and 0 < factors.alpha < norm:
            q = q * factors.alpha / norm
        return (eye + q) @ (eye - q).inverse()

    def delta(self, factors: Factors, weight: Tensor, strength: float) -> Tensor:
        turn, flat = self._rotations(factors), weight.flatten(1)
        eye = torch.eye(turn.shape[-1])
        if turn.dim() == 3:
            rows = flat.reshape(turn.shape[0], turn.shape[1], -1)
            return torch.einsum("knm,kn...->km...", turn * strength - strength * eye, rows).reshape(flat.shape)
        size, out = turn.shape[-1], flat
        for step, one in enumerate(turn * strength + (1 - strength) * eye):
            apart = (size // 2) << step
            out = out.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
            out = torch.einsum("bij,bj...->bi...", one, out)
            out = out.flatten(0, 1).unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
        if "rescale" in factors.names:
            out = out * factors.read("rescale").reshape(-1, 1)
        return out - flat


ADAPTERS: Mapping[Kind, Adapter] = {
    Kind.LORA: LowRank(),
    Kind.LOHA: LoHa(),
    Kind.LOKR: LoKr(),
    Kind.GLORA: GLoRA(),
    Kind.OFT: Oft(),
}


def decomposed(weight: Tensor, delta: Tensor, magnitude: Tensor, strength: float) -> Tensor:
    """DoRA: the sum's direction with a trained magnitude, as ComfyUI bakes it. Returns float32 in the weight's shape.

    magnitude: one number for each row, or for each column (input channel). For rows ComfyUI divides by the norms of
    the weight alone, for columns by those of the sum.
    """
    total = weight + delta.reshape(weight.shape)
    ones = [1] * (weight.dim() - 2)
    by_row = magnitude.shape[0] == weight.shape[0]  # told by the first size, even of a weight with one row
    norms = weight.flatten(1).norm(dim=1) if by_row else total.transpose(0, 1).flatten(1).norm(dim=1)
    axes = {True: (-1, 1, *ones), False: (1, -1, *ones)}
    norms = norms.reshape(axes[by_row]) + torch.finfo(torch.float32).eps
    total = total * (magnitude.reshape(axes[by_row and magnitude.numel() == weight.shape[0]]) / norms)
    return total if strength == 1.0 else weight + strength * (total - weight)
