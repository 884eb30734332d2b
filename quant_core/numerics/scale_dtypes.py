"""How a scale is stored: what its dtype can represent, and which values lie next to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by the size of the float


@dataclass(frozen=True, slots=True)
class ScaleDtype:
    """A float dtype for scales. dtype: on disk. largest: what snap clamps to, None where no scale comes near the end.

    searched: by how many representable values a search of scales moves; None where those lie so close together that
    it tries multiples instead.
    """

    dtype: torch.dtype
    largest: float | None = None
    searched: range | None = None

    def snap(self, scale: Tensor) -> Tensor:
        """float32 scales > 0 -> the nearest float32 values that the dtype holds exactly, ties to even."""
        if self.largest is not None:
            scale = scale.clamp(max=self.largest)
        return scale.to(self.dtype).to(torch.float32)

    def store(self, scale: Tensor) -> Tensor:
        """Snapped float32 scales -> the tensor as written, same shape."""
        return scale.to(self.dtype)

    def load(self, stored: Tensor) -> Tensor:
        """The inverse of store: float32, same shape. Also accepts one-byte floats as uint8 (legacy files)."""
        return (stored.view(self.dtype) if stored.dtype == torch.uint8 else stored).to(torch.float32)

    def neighbour(self, scale: Tensor, step: int) -> Tensor:
        """Stored scales moved by `step` representable values, staying positive and finite; a scale of 0 stays 0."""
        bits = _BITS[self.dtype.itemsize]
        largest = torch.tensor(torch.finfo(self.dtype).max, dtype=self.dtype).view(bits).item()
        code = scale.to(self.dtype).view(bits).to(torch.int64) + step  # the bits of positive floats are in their order
        moved = code.clamp(1, int(largest)).to(bits).view(self.dtype).to(torch.float32)
        return torch.where(scale > 0, moved, scale)


@dataclass(frozen=True, slots=True)
class ExponentDtype(ScaleDtype):
    """E8M0: powers of two, stored as the exponent's byte.

    It snaps UP, so that no element saturates. The OCP Microscaling spec leaves the choice open, and comfy-kitchen
    rounds up.
    """

    def snap(self, scale: Tensor) -> Tensor:
        return decode_e8m0(encode_e8m0(scale))

    def store(self, scale: Tensor) -> Tensor:
        return encode_e8m0(scale)

    def load(self, stored: Tensor) -> Tensor:
        return decode_e8m0(stored.view(torch.uint8))

    def neighbour(self, scale: Tensor, step: int) -> Tensor:
        return torch.where(scale > 0, (scale * 2.0**step).clamp(2.0**-126, 2.0**126), scale)


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


SCALE_F32 = ScaleDtype(torch.float32)
SCALE_BF16 = ScaleDtype(torch.bfloat16)
SCALE_E4M3 = ScaleDtype(torch.float8_e4m3fn, largest=448.0, searched=range(-8, 9))
SCALE_E8M0 = ExponentDtype(torch.uint8, searched=range(-3, 2))
