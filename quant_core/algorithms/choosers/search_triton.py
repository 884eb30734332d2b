"""The sums of a scale search as one kernel: rounding a weight to the nearest level and summing over each block.

search.block_loss and search.least_squares in torch are the specification. The results agree but for the order of
float32 sums. Nothing of the weight's size is allocated, and a candidate takes one launch. Needs float32, levels
ascending.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDTH, _AT_ONCE = 128, 1024  # columns of one block summed by a program; weights of a program


def block_sums(work: Tensor, scale: Tensor, levels: Tensor, weights: Tensor | None, block: tuple[int, int]) -> Tensor:
    """work: [N, K]; scale: [NB, KB], effective; levels: [L]; weights: [K] or None -> float32 [3, NB, KB].

    With r the level nearest to work / scale: sums of (work - scale r)^2, r^2 and r work, each times the weight.
    """
    (n, k), (rows, cols) = work.shape, block
    width = min(_WIDTH, triton.next_power_of_2(cols))
    at_once = max(1, _AT_ONCE // width)
    parts = triton.cdiv(cols, width)
    out = torch.empty(3, n, k // cols, parts, dtype=torch.float32, device=work.device)
    _block_sums[(triton.cdiv(n, at_once), k // cols * parts)](
        work,
        scale,
        levels,
        work if weights is None else weights,
        out,
        n,
        cols,
        rows,
        parts,
        out.stride(0),
        out.stride(1),
        work.stride(0),
        work.stride(1),
        scale.stride(0),
        scale.stride(1),
        COUNT=levels.numel(),
        STEPS=(levels.numel() - 1).bit_length(),
        WEIGHTED=weights is not None,
        ROWS=at_once,
        WIDTH=width,
        num_warps=4,
    )
    return out.view(3, n // rows, rows, k // cols, parts).sum(dim=(2, 4))


@triton.jit
def _block_sums(
    work,
    scale,
    levels,
    weights,
    out,
    n,
    cols,
    rows,
    parts,
    out_kind,
    out_row,
    wr,
    wc,
    sr,
    sc,
    COUNT: tl.constexpr,
    STEPS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    within = part * WIDTH + tl.arange(0, WIDTH)
    column = group * cols + within
    live = row < n
    mask = live[:, None] & (within < cols)[None, :]
    x = tl.load(work + row[:, None] * wr + column[None, :] * wc, mask=mask, other=0.0)
    step = tl.load(scale + row // rows * sr + group * sc, mask=live, other=1.0)
    unit = x / tl.where(step == 0, 1.0, step)[:, None]
    low = tl.zeros([ROWS, WIDTH], dtype=tl.int32)
    high = low + (COUNT - 1)
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        above = tl.minimum(middle + 1, COUNT - 1)
        bound = (tl.load(levels + middle) + tl.load(levels + above)) / 2
        up = (unit > bound) & (low < high)
        low = tl.where(up, middle + 1, low)
        high = tl.where(up, high, middle)
    level = tl.load(levels + low)
    weight = tl.where(mask, 1.0, 0.0)
    if WEIGHTED:
        weight *= tl.load(weights + column, mask=within < cols, other=0.0)[None, :]
    error = x - level * step[:, None]
    at = out + row * out_row + tl.program_id(1)
    tl.store(at, tl.sum(weight * error * error, axis=1), mask=live)
    tl.store(at + out_kind, tl.sum(weight * level * level, axis=1), mask=live)
    tl.store(at + 2 * out_kind, tl.sum(weight * level * x, axis=1), mask=live)
