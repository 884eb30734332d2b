"""Granularity (which weights share a scale) and the dtypes a stored scale can have.

A scale always MULTIPLIES on decode. Scales live as float32 [NB, KB], one per block of the work weight;
`snap` moves them to what the stored dtype can represent, so that rounding sees the reader's scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

# Below this a scale would be subnormal on some devices (flushed to zero on GPUs) or its reciprocal Inf.
# Equal to comfy-kitchen's floor for int8, so that bytes agree; weights this small become zeros.
SCALE_FLOOR = 1e-30
F32_MAX = torch.finfo(torch.float32).max


class Granularity(Enum):
    """Which weights share one scale. `group_size` is the block side where there is one."""

    TENSOR = "tensor"  # one scale
    ROW = "row"  # one per output channel
    GROUP = "group"  # one per row and group_size input channels
    BLOCK = "block"  # one per group_size x group_size tile

    def block(self, shape: tuple[int, int], group_size: int | None) -> tuple[int, int]:
        """(rows, columns) of the weights that share a scale, for a work weight of `shape`."""
        n, k = shape
        return {
            Granularity.TENSOR: (n, k),
            Granularity.ROW: (1, k),
            Granularity.GROUP: (1, group_size),
            Granularity.BLOCK: (group_size, group_size),
        }[self]

    def grid(self, shape: tuple[int, int], group_size: int | None) -> tuple[int, int]:
        """(NB, KB): how many scales along rows and columns."""
        rows, cols = self.block(shape, group_size)
        return shape[0] // rows, shape[1] // cols


class ScaleDtype(Enum):
    """How a scale is stored. The value is the torch dtype on disk (E8M0 as its exponent byte)."""

    F32 = torch.float32
    BF16 = torch.bfloat16
    E4M3 = torch.float8_e4m3fn
    E8M0 = torch.uint8


def divide(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, correctly rounded on every device: CUDA multiplies by the reciprocal of a Python number, an ulp off."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def snap(scale: Tensor, dtype: ScaleDtype) -> Tensor:
    """float32 scales > 0 -> the nearest float32 values that the stored dtype holds exactly.

    E8M0 rounds UP, so that no element saturates (the OCP Microscaling spec leaves the choice open; comfy-kitchen
    rounds up). E4M3 and BF16 round to nearest even; E4M3 is clamped to 448.
    """
    if dtype is ScaleDtype.F32:
        return scale
    if dtype is ScaleDtype.E8M0:
        return decode_e8m0(encode_e8m0(scale))
    if dtype is ScaleDtype.E4M3:
        scale = scale.clamp(max=448.0)
    return scale.to(dtype.value).to(torch.float32)


def store(scale: Tensor, dtype: ScaleDtype) -> Tensor:
    """Snapped float32 scales -> the tensor as written, same shape."""
    if dtype is ScaleDtype.E8M0:
        return encode_e8m0(scale)
    return scale.to(dtype.value)


def load(stored: Tensor, dtype: ScaleDtype) -> Tensor:
    """The inverse of store: float32, same shape. Also accepts E4M3 or E8M0 bytes as uint8 (legacy files)."""
    if dtype is ScaleDtype.E8M0:
        return decode_e8m0(stored.view(torch.uint8))
    if dtype is ScaleDtype.E4M3 and stored.dtype == torch.uint8:
        stored = stored.view(torch.float8_e4m3fn)
    return stored.to(torch.float32)


def encode_e8m0(scale: Tensor) -> Tensor:
    """float32 >= 0 -> uint8 exponent e with 2**(e - 127) >= scale, by exponent bits, so every device agrees.

    0 -> 0 (a block of zeros). comfy-kitchen takes ceil(log2(x)) in float32, which differs only where x lies within
    2 ulp above a power of two; there it rounds down and saturates.
    """
    bits = scale.to(torch.float32).contiguous().view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    exponent = exponent + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return exponent.clamp(0, 254).to(torch.uint8)


def decode_e8m0(exponent: Tensor) -> Tensor:
    """uint8 -> float32 2**(e - 127); 0 decodes to 0, as comfy-kitchen reads it."""
    return (exponent.to(torch.int32) << 23).view(torch.float32)


@dataclass(frozen=True, slots=True)
class QParams:
    """Everything but the codes: what turns codes back into weights.

    scale: float32 [NB, KB], exactly as the stored dtype represents it, without the parent.
    parent: float32, () or [NB, 1]: multiplies `scale` (NVFP4's weight_scale_2, W4A8's weight_s_channel).
    zero: float32 [NB, KB], added after scaling (AWQ). codebook: float32 [16], when the format stores its own.
    """

    scale: Tensor
    parent: Tensor | None = None
    zero: Tensor | None = None
    codebook: Tensor | None = None

    def effective(self) -> Tensor:
        """float32 [NB, KB]: what one unit of an element is worth."""
        return self.scale if self.parent is None else self.scale * self.parent

    def rows(self, blocks: slice) -> QParams:
        """The part that belongs to some rows of blocks."""
        cut = lambda t: t if t is None or t.dim() < 2 else t[blocks]  # noqa: E731
        return QParams(self.scale[blocks], cut(self.parent), cut(self.zero), self.codebook)

    def to(self, device: torch.device | str) -> QParams:
        move = lambda t: None if t is None else t.to(device)  # noqa: E731
        return QParams(self.scale.to(device), move(self.parent), move(self.zero), move(self.codebook))


def block_view(work: Tensor, block: tuple[int, int]) -> Tensor:
    """[N, K] -> view [NB, bn, KB, bk]; scales [NB, KB] broadcast over it as scale[:, None, :, None]."""
    n, k = work.shape
    rows, cols = block
    return work.view(n // rows, rows, k // cols, cols)


def block_absmax(work: Tensor, block: tuple[int, int]) -> Tensor:
    """float32 [N, K] -> float32 [NB, KB]."""
    view = block_view(work, block)
    # amax then -amin reads the data twice without a full-size abs() copy: less memory traffic on a CPU.
    return torch.maximum(view.amax(dim=(1, 3)), -view.amin(dim=(1, 3))).abs_()  # abs: no -0 for a block of zeros
