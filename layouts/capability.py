"""What a device can run, answered before any kernel is called: never a warning per call, never try-and-fall-back."""
from __future__ import annotations

import logging
import os
import shutil
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

from ..quant_core.format import Format
from .kernels.activation import LONGEST_GROUP
from .kernels.weight import kind_of

logger = logging.getLogger(__name__)

# Rows of x up to which one weight row per program beats a tile, and up to which decoding inside the matmul beats
# decoding first. Measured by bench/layouts.py on an H200; see there.
GEMV_ROWS = 8
DECODE_DOT_ROWS = 64


@dataclass(frozen=True, slots=True)
class Ability:
    """triton: our kernels run. fp8_dot: they may multiply fp8. scaled_mm: torch's row-wise fp8 matmul is there.

    reason: why there are no kernels, as a phrase; empty where there are.
    """

    triton: bool
    fp8_dot: bool
    scaled_mm: bool
    reason: str


def ability(device: torch.device) -> Ability:
    """Cached per device; logs once per device, at level INFO, where it has no kernels."""
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    return _ability(device.type, index)


@lru_cache(maxsize=64)
def _ability(kind: str, index: int | None) -> Ability:
    capability = torch.cuda.get_device_capability(index) if kind == "cuda" else (0, 0)
    answer = judge(kind, capability, is_rocm=torch.version.hip is not None, has_triton=find_spec("triton") is not None,
                   has_compiler=_has_c_compiler(), platform=sys.platform)
    if answer.reason:
        logger.info("QuantPress layers dequantize on %s: %s", kind, answer.reason)
    return answer


def judge(kind: str, capability: tuple[int, int], *, is_rocm: bool, has_triton: bool, has_compiler: bool,
          platform: str) -> Ability:
    """The rule itself, from plain facts."""
    reasons = [
        (kind != "cuda", f"there are no kernels for {kind} devices"),
        (is_rocm, "the kernels were never tried on ROCm"),
        (capability < (8, 0), f"Triton needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"),
        (not has_triton, "the package triton is not installed (on Windows: triton-windows)"),
        (not has_compiler, "Triton needs a C compiler: install gcc, or set CC"),
    ]
    reason = next((text for applies, text in reasons if applies), "")
    fp8_dot = not reason and capability >= (8, 9)
    # Row-wise scales: tried on Hopper only; torch's Windows builds lack them. Elsewhere our own fp8 kernel serves.
    return Ability(not reason, fp8_dot, fp8_dot and capability == (9, 0) and platform != "win32", reason)


def _has_c_compiler() -> bool:
    # triton-windows brings its own.
    return sys.platform == "win32" or bool(os.environ.get("CC")) or any(map(shutil.which, ("gcc", "clang", "cc")))


def path(fmt: Format, device: torch.device) -> str:
    """How a linear layer of this format runs on the device: "dequantize", "triton" or "scaled_mm"."""
    able = ability(device)
    if not able.triton:
        return "dequantize"
    whole_rows = fmt.group_size is None
    return "scaled_mm" if able.scaled_mm and kind_of(fmt) == "fp8" and whole_rows else "triton"


@dataclass(frozen=True, slots=True)
class Problem:
    """One call of a linear layer. group_rows, group_cols: the weights that share a scale; kind: see Weight."""

    kind: str
    m: int
    n: int
    k: int
    group_rows: int
    group_cols: int
    dtype: torch.dtype


def kernels_read(problem: Problem, able: Ability) -> bool:
    """The kernels can decode this weight: groups are whole rows or powers of two from 16 to 1024."""
    group = problem.group_cols
    return able.triton and (group == problem.k or (16 <= group <= 1024 and group & (group - 1) == 0))


def linear_path(problem: Problem, able: Ability) -> str:
    """"dequantize", "gemv", "decode_dot", "decode" (then torch's matmul), "scaled_dot" or "scaled_mm".

    float32 inputs ask for precision: their activations stay float. So do those of a few rows, where the weight's
    bytes alone cost time.
    """
    p = problem
    if p.m == 0 or not kernels_read(p, able):
        return "dequantize"
    if p.m <= GEMV_ROWS:
        return "gemv"
    if p.dtype is torch.float32:
        return "decode"
    dots = p.kind == "int8" or (p.kind == "fp8" and able.fp8_dot)
    fits = p.group_cols % 64 == 0 or p.group_cols == p.k
    if dots and fits and p.group_cols <= LONGEST_GROUP:
        whole = p.kind == "fp8" and p.group_cols == p.k and p.group_rows == 1
        aligned = p.n % 16 == 0 and p.k % 16 == 0
        return "scaled_mm" if able.scaled_mm and whole and aligned and p.dtype is torch.bfloat16 else "scaled_dot"
    return "decode_dot" if p.m <= DECODE_DOT_ROWS else "decode"
