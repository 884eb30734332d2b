"""Element grids: the set of values one stored code can mean, before any scale.

An element knows its grid (`values`), its largest magnitude (`max`), how to round to it, which two
grid points bracket a value, and how codes are stored. It knows nothing of scales or tensors' names.
All maths is float32; inputs are never changed in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .ranks import look_up, rank_table


@dataclass(frozen=True, slots=True)
class FloatElement:
    """An 8-bit float grid that torch can cast to (E4M3, E5M2), saturating.

    encode clamps first, because torch's cast does not saturate: above the maximum it gives NaN (E4M3)
    or Inf (E5M2). Rounding is to nearest, ties to even, as the cast does it.
    Source: OCP OFP8 v1.0; the `fn` variant has no Inf.
    """

    name: str
    dtype: torch.dtype
    max: float
    bits: int = 8
    repeats_by_octave: bool = True

    def values(self, device: torch.device | str = "cpu") -> Tensor:
        return _float_grid(self.dtype, self.max).to(device)

    def encode(self, x: Tensor) -> Tensor:
        """x: float32, any shape -> codes of dtype `self.dtype`, same shape."""
        return x.clamp(-self.max, self.max).to(self.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        if codes.is_cuda:
            return codes.to(torch.float32)
        return look_up(_float_codes(self.dtype), codes.view(torch.uint8))  # 3 times as fast as torch's cast on a CPU

    def round(self, x: Tensor) -> Tensor:
        """Nearest grid value, float32."""
        return self.decode(self.encode(x))

    def bracket(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The grid neighbours lo <= clamp(x) <= hi, float32; equal where x lies on the grid."""
        x = x.clamp(-self.max, self.max)
        codes = x.to(self.dtype).view(torch.uint8)
        near, code = look_up(_float_codes(self.dtype, str(x.device)), codes), codes.to(torch.int32)
        below, above = _float_neighbours(self.dtype, str(x.device))
        return look_up(below, code.add(near > x, alpha=256)), look_up(above, code.add(near < x, alpha=256))


@lru_cache(maxsize=8)
def _float_neighbours(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Two tables float32 [512]: what a code means; from 256 on the next value below it (first table) or above it."""
    values = _float_codes(dtype)
    raw = torch.arange(256, dtype=torch.int16)
    signed = torch.where(raw >= 128, -(raw - 128), raw)

    def step(direction: int) -> Tensor:
        moved = signed + direction
        codes = torch.where(moved < 0, -moved + 128, moved).clamp(0, 255)
        return torch.cat([values, values[codes.int()]]).to(device)

    return step(-1), step(+1)


@lru_cache(maxsize=8)
def _float_codes(dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """float32 [256]: what each code means, NaN and Inf included."""
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).to(torch.float32).to(device)


@lru_cache(maxsize=8)
def _float_grid(dtype: torch.dtype, largest: float) -> Tensor:
    every = _float_codes(dtype)
    return torch.unique(every[every.abs() <= largest])  # drops NaN and Inf; sorted; -0 and 0 are one


@dataclass(frozen=True, slots=True)
class IntElement:
    """The integers -max .. max (symmetric), stored as int8. Ties to even."""

    name: str
    max: float
    bits: int
    dtype: torch.dtype = torch.int8
    repeats_by_octave: bool = False

    def values(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.arange(-self.max, self.max + 1, dtype=torch.float32, device=device)

    def encode(self, x: Tensor) -> Tensor:
        return x.round().clamp_(-self.max, self.max).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def round(self, x: Tensor) -> Tensor:
        return x.round().clamp_(-self.max, self.max)

    def bracket(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clamp(-self.max, self.max)
        return x.floor(), x.ceil()


@dataclass(frozen=True, slots=True)
class CodebookElement:
    """Up to 16 arbitrary values; code i means table[i]. Stored as uint8 codes before packing.

    table: in CODE order, not sorted. A value exactly between two neighbours goes to the lower one.
    """

    name: str
    table: tuple[float, ...]
    bits: int = 4
    dtype: torch.dtype = torch.uint8
    repeats_by_octave: bool = False

    @property
    def max(self) -> float:
        return max(abs(v) for v in self.table)

    def values(self, device: torch.device | str = "cpu") -> Tensor:
        return _book(self.table, str(device)).sorted_values

    def encode(self, x: Tensor) -> Tensor:
        book = _book(self.table, str(x.device))
        rank = rank_table(book.bounds, str(x.device)).rank(x)
        return rank if book.in_order else look_up(book.codes, rank)

    def decode(self, codes: Tensor) -> Tensor:
        return look_up(_book(self.table, str(codes.device)).table, codes)

    def round(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def bracket(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels = tuple(self.values("cpu").tolist())
        x = x.clamp(levels[0], levels[-1])
        grid, above = self.values(x.device), rank_table(levels, str(x.device)).rank(x)
        hi = look_up(grid, above)
        return look_up(grid, above - (hi != x).view(torch.uint8)), hi


@dataclass(frozen=True, slots=True)
class _Book:
    table: Tensor  # f32 [n], code order
    sorted_values: Tensor  # f32, ascending, distinct
    codes: Tensor  # uint8: rank -> code
    bounds: tuple[float, ...]  # a value belongs to the rank that counts the bounds below it
    in_order: bool  # rank and code are the same


@lru_cache(maxsize=64)
def _book(table: tuple[float, ...], device: str) -> _Book:
    values = torch.tensor(table, dtype=torch.float32)
    # + 0.0: -0 sorts as 0. A codebook's two zeros stay two ranks with the bound 0 between them, which is how
    # bitsandbytes' FP4 gives tiny positive weights the code of -0.
    ranked = sorted((value + 0.0, code) for code, value in enumerate(values.tolist()))
    grid = torch.tensor([value for value, _ in ranked], dtype=torch.float32)
    codes = [code for _, code in ranked]
    bounds = tuple(((grid[:-1] + grid[1:]) / 2).tolist())
    return _Book(
        values.to(device),
        torch.unique(grid).to(device),
        torch.tensor(codes, dtype=torch.uint8).to(device),
        bounds,
        codes == list(range(len(codes))),
    )


@dataclass(frozen=True, slots=True)
class E2M1Element:
    """FP4 with 2 exponent bits and 1 mantissa bit: 0 0.5 1 1.5 2 3 4 6 and their negatives; ties to the even code.

    -0 has a code of its own (8), which hardware encoders write for tiny negative values, and so does encode.
    Source: OCP Microscaling v1.0.
    """

    name: str = "e2m1"
    dtype: torch.dtype = torch.uint8
    bits: int = 4
    max: float = 6.0
    repeats_by_octave: bool = False  # three octaves are too few

    def values(self, device: torch.device | str = "cpu") -> Tensor:
        return _book(_E2M1_TABLE, str(device)).sorted_values

    def encode(self, x: Tensor) -> Tensor:
        """Codes 0..7 are the magnitudes in order, bit 3 the sign. Saturates."""
        size = x.abs()
        # Steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6: each term counts the steps taken in its stretch.
        code = (size * 2).round_().clamp_(max=4)
        code += size.round().sub_(2).clamp_(0, 2)
        code += size.mul_(0.5).round_().sub_(2).clamp_(0, 1)
        return code.to(torch.uint8) | (torch.signbit(x).view(torch.uint8) << 3)

    def decode(self, codes: Tensor) -> Tensor:
        return look_up(_book(_E2M1_TABLE, str(codes.device)).table, codes)

    def round(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def bracket(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return CodebookElement("e2m1", _E2M1_TABLE).bracket(x)


_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_TABLE = _E2M1_MAGNITUDES + tuple(-v for v in _E2M1_MAGNITUDES)

E4M3 = FloatElement("e4m3", torch.float8_e4m3fn, 448.0)
E5M2 = FloatElement("e5m2", torch.float8_e5m2, 57344.0)
INT8 = IntElement("int8", 127.0, 8)
INT4 = IntElement("int4", 7.0, 4)

E2M1 = E2M1Element()

# NormalFloat4: equal-mass quantiles of N(0, 1) with an exact zero and +-1. QLoRA, arXiv 2305.14314, appendix E.
NF4 = CodebookElement(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

# bitsandbytes' FP4: sign, 2 exponent bits, 1 mantissa bit with bias 2 and its own exponent order, divided by 12.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = CodebookElement("fp4", tuple(v / 12.0 for v in _FP4_TWELFTHS) + tuple(0.0 - v / 12.0 for v in _FP4_TWELFTHS))
