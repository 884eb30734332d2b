"""What a device can run, answered before any kernel is called: never a warning per call, never try-and-fall-back."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..quant_core.formats.base import Format
from ..quant_core.numerics.triton_kernels import capability_of, numbered, obstacle
from .kernels.activation import LONGEST_GROUP
from .kernels.weight import Geometry, geometry_of

logger = logging.getLogger(__name__)

# Rows of x up to which each kernel is the fastest, read from rows of bench/speed/layouts.py --routes on an H200.
GEMV_ROWS = 2  # one program per few weight rows; each row of x reads the weight again
FEW_ROWS = 16  # weights decoded inside the matmul; activations stay float
DECODE_DOT_ROWS = 64  # the same, where decoding first would write DECODE_DOT_WEIGHTS or more
DECODE_DOT_WEIGHTS = 1 << 24
SCALED_MM_ROWS = 64  # above this torch's fp8 matmul beats ours
SCALED_DOT_ROWS = 256  # up to here it pays to scale every row and group of a weight inside the matmul


@dataclass(frozen=True, slots=True)
class Ability:
    """triton: our kernels run. fp8_dot: they may multiply fp8. scaled_mm: torch's row-wise fp8 matmul is there.

    fast_16bit: a data-centre GPU. Its 16-bit matmul has half the rate of its 8-bit one; on consumer GPUs it is a
    quarter.
    reason: why there are no kernels, as a phrase; empty where there are.
    """

    triton: bool
    fp8_dot: bool
    scaled_mm: bool
    fast_16bit: bool
    reason: str


def ability(device: torch.device) -> Ability:
    """Cached per device; logs once per device, at level INFO, where it has no kernels."""
    return _ability(numbered(device))


@lru_cache(maxsize=64)
def _ability(device: torch.device) -> Ability:
    answer = judge(capability_of(device), obstacle(device), sys.platform)
    if answer.reason:
        logger.info("QuantPress layers dequantize on %s: %s", device.type, answer.reason)
    return answer


def judge(capability: tuple[int, int], reason: str, platform: str) -> Ability:
    """The rule itself, from plain facts. reason: quant_core.triton_kernels.obstacle of the device."""
    fp8_dot = not reason and capability >= (8, 9)
    # Row-wise scales: tried on Hopper only; torch's Windows builds lack them. Elsewhere our own fp8 kernel serves.
    return Ability(
        triton=not reason,
        fp8_dot=fp8_dot,
        scaled_mm=fp8_dot and capability == (9, 0) and platform != "win32",
        fast_16bit=not reason and capability in {(8, 0), (9, 0), (10, 0), (10, 3)},
        reason=reason,
    )


def path(fmt: Format, device: torch.device) -> str:
    """How a linear layer of this format runs on the device: "dequantize", "triton" or "scaled_mm"."""
    able = ability(device)
    if not able.triton:
        return "dequantize"
    multiple = fmt.group_size or 16
    large = geometry_of(fmt, (multiple * 16, multiple * 32))
    if large is None:
        return "dequantize"
    return "scaled_mm" if linear_path(large, 4096, torch.bfloat16, able) == "scaled_mm" else "triton"


def kernels_read(geometry: Geometry, able: Ability) -> bool:
    """The kernels can decode this weight: groups are whole rows or powers of two from 16 to 1024."""
    group = geometry.group_cols
    return able.triton and (geometry.whole_row or (16 <= group <= 1024 and group & (group - 1) == 0))


@lru_cache(maxsize=4096)
def linear_path(geometry: Geometry, rows: int, dtype: torch.dtype, able: Ability) -> str:
    """ "dequantize", "gemv", "decode_dot", "decode" (then torch's matmul), "scaled_dot" or "scaled_mm".

    float32 inputs ask for precision: their activations stay float. So do those of a few rows, where the weight's
    bytes alone cost time.
    """
    n, k = geometry.shape
    if rows == 0 or not kernels_read(geometry, able):
        return "dequantize"
    if rows <= GEMV_ROWS:
        return "gemv"
    if dtype is torch.float32:
        return "decode"
    if rows > FEW_ROWS and _multiplies_codes(geometry, rows, able):
        whole = (
            geometry.kind == "fp8" and geometry.whole_row and geometry.group_rows == 1 and n % 16 == 0 and k % 16 == 0
        )
        torchs = able.scaled_mm and whole and dtype is torch.bfloat16 and rows > SCALED_MM_ROWS
        return "scaled_mm" if torchs else "scaled_dot"
    fused = rows <= FEW_ROWS or (rows <= DECODE_DOT_ROWS and n * k >= DECODE_DOT_WEIGHTS)
    return "decode_dot" if fused else "decode"


def _multiplies_codes(geometry: Geometry, rows: int, able: Ability) -> bool:
    """8-bit codes are multiplied as they are: the chip can, the groups fit the kernel, and it is the faster way."""
    if not (geometry.kind == "int8" or (geometry.kind == "fp8" and able.fp8_dot)):
        return False
    if geometry.whole_row:
        return geometry.group_cols <= LONGEST_GROUP
    # Scaling a product by every row's and group's own scale costs more than decoding first where 16 bits are fast.
    pays = geometry.group_rows > 1 or rows <= SCALED_DOT_ROWS or not able.fast_16bit
    return geometry.group_cols % 64 == 0 and pays
