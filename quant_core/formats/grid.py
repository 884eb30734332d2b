"""From weights to codes on an element grid and back, under one scale per block; whole, or some columns at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.hadamard import rotate_columns, rotate_hessian
from ..numerics.metrics import relative_error
from ..numerics.scale_dtypes import SCALE_F32, ScaleDtype
from ..numerics.scales import SCALE_FLOOR, Granularity, QParams, block_absmax, block_view, divide, shape_of
from ..numerics.slices import row_slices
from .geometry import BlockGeometry
from .records import ColumnGrid

# On a CPU, encode and decode work through slices of this many weights, which stay in the cache between passes.
_CPU_SLICE = 1 << 18
# Rotating sums up to 1024 weights, twice: larger outliers would overflow float32. They saturate here.
_ROTATABLE = 1e34


@dataclass(frozen=True, kw_only=True)
class ElementGrid(BlockGeometry):
    """The numerics of a format: value = element * scale of its block.

    A block of zeros gets scale 1 and codes 0, where a subclass does not say otherwise.
    signed_scales: a scale may be negative, which mirrors the grid: worth it where the grid is not symmetric.
    """

    scale_dtype: ScaleDtype = SCALE_F32
    signed_scales: bool = False
    rows_are_independent: bool = True  # but for the tensor's absmax

    def prepare(self, w: Tensor) -> Tensor:
        """float32 [N, K] -> work [Np, Kp]: padded, then rotated. May return w itself: do not write into the result."""
        n, k = w.shape
        rows, cols = self.work_shape((n, k))
        if (rows, cols) != (n, k):
            w = torch.nn.functional.pad(w, (0, cols - k, 0, rows - n))
        if self.rotation is not None:
            rotated = rotate_columns(w, self.rotation)
            if not bool(torch.isfinite(torch.stack(torch.aminmax(rotated))).all()):
                rotated = rotate_columns(w.clamp(-_ROTATABLE, _ROTATABLE), self.rotation)
            w = rotated
        return w

    def restore(self, work: Tensor, shape: tuple[int, int]) -> Tensor:
        """The inverse of prepare."""
        if self.rotation is not None:
            work = rotate_columns(work, self.rotation)
        return work[: shape[0], : shape[1]]

    def prepare_hessian(self, h: Tensor) -> Tensor:
        """float32 [K, K], X^T X of the layer's inputs -> [Kp, Kp], of the work weight's columns. May overwrite h."""
        pad = self.work_shape((1, h.shape[0]))[1] - h.shape[0]
        if pad:
            h = torch.nn.functional.pad(h, (0, pad, 0, pad))
        if self.rotation is not None:
            rotate_hessian(h, self.rotation)
        return h

    def absmax(self, work: Tensor) -> QParams:
        """The default scales: the block's largest magnitude lands on the element's largest value."""
        return self.qparams(divide(self._block_absmax(work), self.element.max))

    def _block_view(self, work: Tensor) -> Tensor:
        """[N, K] -> view [NB, bn, KB, bk]; scales [NB, KB] broadcast over it as scale[:, None, :, None]."""
        return block_view(work, self.block(shape_of(work)))

    def _block_absmax(self, work: Tensor) -> Tensor:
        return block_absmax(work, self.block(shape_of(work)))

    def absmax_under(self, rows: Tensor, largest: Tensor) -> QParams:
        """absmax for some rows of a work weight whose largest magnitude is `largest`, float32 ()."""
        if self.granularity is Granularity.TENSOR:
            return self.qparams(divide(largest, self.element.max).reshape(1, 1))
        return self.absmax(rows)

    def qparams(self, effective: Tensor, like: QParams | None = None) -> QParams:
        """Wished effective scales [NB, KB], float32 >= 0 -> storable ones.

        like: keep its parent, zero point and codebook.
        """
        scale = torch.where(effective > 0, effective.clamp(SCALE_FLOOR), torch.ones_like(effective))
        return QParams(self.scale_dtype.snap(scale))

    def encode(self, work: Tensor, qp: QParams) -> Tensor:
        """Nearest codes [Np, Kp] under these scales. Values already on the grid keep their codes.

        For a part of a weight: of a whole one on a GPU it takes up to four copies, and `slices.encode_rows` one slice.
        """
        work, scale = work.contiguous(), qp.effective()
        codes = torch.empty(work.shape, dtype=self.element.dtype, device=work.device)
        for rows, blocks in self._slices(work):
            x = self._to_units(self._block_view(work[rows]), scale[blocks][:, None, :, None])
            codes[rows] = self.element.encode(x).view(-1, work.shape[1])
        return codes

    def _to_units(self, view: Tensor, scale: Tensor) -> Tensor:
        """Weights -> multiples of the scale. Division: the correctly rounded quotient."""
        return view / scale

    def decode(self, codes: Tensor, qp: QParams) -> Tensor:
        """codes [Np, Kp] -> float32 work weight, value = element * effective scale."""
        scale = qp.effective()
        work = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows, blocks in self._slices(codes):
            view = self._block_view(self.element.decode(codes[rows]))
            work[rows] = (view * scale[blocks][:, None, :, None]).view(-1, codes.shape[1])
        return work

    def round(self, work: Tensor, qp: QParams) -> Tensor:
        """Round to nearest: float32 [Np, Kp], every value exactly what decode gives."""
        return self.decode(self.encode(work, qp), qp)

    def _slices(self, work: Tensor) -> Iterator[tuple[slice, slice]]:
        """Row slices of the weight and of the scale grid: whole on a GPU, cache-sized on a CPU."""
        shape = shape_of(work)
        one_scale = self.granularity is Granularity.TENSOR  # any slice lies under it
        height = 1 if one_scale else self.block(shape)[0]
        for rows in row_slices(shape, work.numel() if work.is_cuda else _CPU_SLICE, height):
            yield rows, slice(0, 1) if one_scale else slice(rows.start // height, rows.stop // height)

    # ---- columns: what error feedback and learned rounding need ------------------------------------------------
    def column_scale(self, qp: QParams, start: int, stop: int, work_shape: tuple[int, int]) -> Tensor:
        """Effective scales of columns start..stop, float32 [Np, stop - start] (expanded views where possible)."""
        return self._expand_columns(qp.effective(), start, stop, work_shape)

    def _expand_columns(self, per_block: Tensor, start: int, stop: int, work_shape: tuple[int, int]) -> Tensor:
        rows, cols = self.block(work_shape)
        index = torch.arange(start, stop, device=per_block.device) // cols
        return per_block[:, index].repeat_interleave(rows, dim=0) if rows > 1 else per_block[:, index]

    def round_columns(self, columns: Tensor, qp: QParams, start: int, work_shape: tuple[int, int]) -> Tensor:
        """float32 [Np, C], the work weight's columns from `start` on -> nearest decoded values."""
        scale = self.column_scale(qp, start, start + columns.shape[1], work_shape)
        return self.element.round(self._to_units(columns, scale)) * scale

    def bracket_columns(
        self, columns: Tensor, qp: QParams, start: int, work_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The decoded neighbours lo <= w <= hi of each weight (equal on the grid and beyond its ends)."""
        scale = self.column_scale(qp, start, start + columns.shape[1], work_shape)
        lo, hi = (part * scale for part in self.element.bracket(self._to_units(columns, scale)))
        return (torch.minimum(lo, hi), torch.maximum(lo, hi)) if self.signed_scales else (lo, hi)

    def levels(self, device: torch.device) -> Tensor | None:
        """Ascending float32 [L] where every weight decodes to level * effective scale.

        None for a format with zero points, or with levels that depend on the scale.
        """
        return self.element.values(device)

    def column_grid(self, qp: QParams, columns: Tensor, work_shape: tuple[int, int]) -> ColumnGrid:
        """The values within reach of the weights in `columns`, int64 [C], in any order."""
        return ColumnGrid(
            self.element.values(columns.device), self._gather_columns(qp.effective(), columns, work_shape)
        )

    def _gather_columns(self, per_block: Tensor, columns: Tensor, work_shape: tuple[int, int]) -> Tensor:
        rows, cols = self.block(work_shape)
        gathered = per_block[:, columns // cols]
        return gathered.repeat_interleave(rows, dim=0) if rows > 1 else gathered

    def decoding_error(self, work: Tensor, codes: Tensor, qp: QParams) -> float:
        """Relative Frobenius error of the decoded codes against the work weight. A CPU takes it slice by slice."""
        wrong = total = 0.0
        for rows, blocks in self._slices(work):
            reference = work[rows]
            decoded = self.decode(codes[rows], qp.rows(blocks))
            wrong += float(decoded.sub_(reference).norm()) ** 2
            total += float(reference.norm()) ** 2
        if not math.isfinite(wrong + total):  # squares of 1e20 and above
            return relative_error(work, self.decode(codes, qp))
        return math.sqrt(wrong / total) if total else math.sqrt(wrong) and math.inf
