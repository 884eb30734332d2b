"""Pure permutations of codes and scales: nibble packing and the cuBLAS 128x4 scale swizzle, with inverses."""

from __future__ import annotations

import torch
from torch import Tensor


def round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def pack_nibbles(codes: Tensor, high_first: bool) -> Tensor:
    """codes: uint8 or int8 [N, K], K even, low 4 bits used -> uint8 [N, K // 2].

    high_first: the even column sits in the HIGH nibble (NVFP4, bitsandbytes); otherwise in the low one (int4, AWQ).
    """
    pairs = codes.view(torch.uint8).reshape(codes.shape[0], -1, 2)
    even, odd = pairs[..., 0] & 15, pairs[..., 1] & 15
    high, low = (even, odd) if high_first else (odd, even)
    return (high << 4) | low


def unpack_nibbles(packed: Tensor, high_first: bool) -> Tensor:
    """uint8 or int8 [N, K // 2] -> uint8 [N, K] in 0..15; the inverse of pack_nibbles."""
    raw = packed.view(torch.uint8)
    high, low = raw >> 4, raw & 15
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, dim=-1).reshape(packed.shape[0], -1)


def sign_extend_nibbles(codes: Tensor) -> Tensor:
    """uint8 0..15 as two's-complement int4 -> int8 -8..7."""
    return ((codes << 4).view(torch.int8)) >> 4


def swizzled_shape(rows: int, cols: int) -> tuple[int, int]:
    return round_up(rows, 128), round_up(cols, 4)


def swizzle_scales(scales: Tensor) -> Tensor:
    """[R, C] -> [round_up(R, 128), round_up(C, 4)] in cuBLAS' block-scale order, zero padded.

    Within a 128x4 tile, element (r, c) goes to flat position (r % 32) * 16 + (r // 32) * 4 + c.
    Source: cuBLAS documentation, "1D block scaling factors layout".
    """
    rows, cols = scales.shape
    padded_rows, padded_cols = swizzled_shape(rows, cols)
    raw = scales.view(torch.uint8)  # every scale type here is one byte wide
    padded = raw.new_zeros((padded_rows, padded_cols))
    padded[:rows, :cols] = raw
    tiles = padded.view(padded_rows // 128, 4, 32, padded_cols // 4, 4)  # [tr, r // 32, r % 32, tc, c]
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_cols).view(scales.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of swizzle_scales, cropped to [rows, cols]."""
    padded_rows, padded_cols = swizzled_shape(rows, cols)
    raw = swizzled.view(torch.uint8).reshape(padded_rows // 128, padded_cols // 4, 32, 4, 4)
    plain = raw.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_cols)
    return plain[:rows, :cols].contiguous().view(swizzled.dtype)
