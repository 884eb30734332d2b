"""What a format is: data plus a few pure functions. Everything else about a format is derived from here.

A weight passes through four spaces:
    w [N, K]  --prepare-->  work [Np, Kp]  --encode(qparams)-->  codes  --pack-->  tensors as on disk
and back by unpack, decode, restore. `prepare` pads and rotates; algorithms see only `work`, `QParams` and
`round_columns` / `bracket_columns`, so they compose with every format.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..cancel import poll
from ..checkpoint.header import TensorInfo
from ..errors import RequestError
from ..numerics.metrics import relative_error
from ..numerics.scale_dtypes import SCALE_F32, ScaleDtype
from ..numerics.scales import SCALE_FLOOR, Granularity, QParams, block_absmax, block_view, divide
from .input_scale import InputScaleRule
from .records import ColumnGrid, Element, Runtime, TensorSpec

# On a CPU, encode and decode work through slices of this many weights, which stay in the cache between passes.
_CPU_SLICE = 1 << 18
# Rotating sums up to 1024 weights, twice: larger outliers would overflow float32. They saturate here.
_ROTATABLE = 1e34


@dataclass(frozen=True)
class Format(ABC):
    """Base of all formats whose codes lie on an element grid times a scale. Subclasses override what differs.

    A block of zeros gets scale 1 and codes 0, where a subclass does not say otherwise.

    name: registry name, also the command's and the node's. on_disk: the `format` string in the JSON.
    error_bound: largest |w - decode| as a fraction of the block's absmax, for round-to-nearest with absmax scales;
    tensor_bound: what is added to it as a fraction of the tensor's absmax (a coarse parent scale).
    pad_to: N and K of the work weight are padded with zeros to multiples of this.
    signed_scales: a scale may be negative, which mirrors the grid: worth it where the grid is not symmetric.
    modelopt_differs: NVIDIA ModelOpt stores the same numbers in another order than ComfyUI.
    """

    name: str
    on_disk: str
    title: str
    element: Element
    granularity: Granularity
    runtime: Runtime
    source: str
    error_bound: float
    tensor_bound: float = 0.0
    scale_dtype: ScaleDtype = SCALE_F32
    group_size: int | None = None
    group_sizes: tuple[int, ...] = ()
    rotation: int | None = None
    rotations: tuple[int, ...] = ()
    pad_to: int = 1
    k_multiple: int = 1
    signed_scales: bool = False
    rows_are_independent: bool = True  # but for the tensor's absmax
    modelopt_differs: bool = False

    # ---- options -----------------------------------------------------------------------------------------------
    def with_options(self, group_size: int | None = None, rotation: int | None = None) -> Format:
        """The same format with another group size or rotation group; RequestError when it does not offer that."""
        fmt = self
        if group_size is not None:
            fmt = fmt._option("group_size", group_size, self.group_sizes)
        if rotation is not None:
            fmt = fmt._option("rotation", rotation, self.rotations)
        return fmt

    def _option(self, field: str, value: int, offered: tuple[int, ...]) -> Format:
        if value not in offered:
            raise RequestError(
                f"{value} is not offered by {self.name}. "
                + (
                    f"Choose one of {', '.join(map(str, offered))}."
                    if offered
                    else "This format has none: leave it out."
                ),
                field,
            )
        return replace(self, **{field: value})

    def for_shape(self, shape: tuple[int, ...]) -> Format:
        """The variant that fits a weight of this shape (a smaller rotation group, say); see `problem` first."""
        if self.rotation is None or shape[1] % self.rotation == 0:
            return self
        fitting = [r for r in self.rotations if r < self.rotation and shape[1] % r == 0]
        return replace(self, rotation=max(fitting)) if fitting else self

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot take the format, as a phrase; None when it can."""
        if len(shape) != 2 or 0 in shape:
            return f"the weight has shape {list(shape)}, {self.name} needs two dimensions, none of them 0"
        n, k = shape
        fmt = self.for_shape(shape)
        if fmt.granularity is Granularity.BLOCK and n % fmt.group_size:
            return f"out_features={n} is not a multiple of group_size {fmt.group_size} ({self.name})"
        needs = [
            ("group_size", fmt.group_size if self.pad_to == 1 else None),
            ("rotation group", fmt.rotation),
            ("", self.k_multiple),
        ]
        for what, multiple in needs:
            if multiple and k % multiple:
                return f"in_features={k} is not a multiple of {what} {multiple} ({self.name})".replace("  ", " ")
        return None

    # ---- geometry: pure functions of the shape -----------------------------------------------------------------
    def work_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        pad = self.pad_to
        return (shape[0] + pad - 1) // pad * pad, (shape[1] + pad - 1) // pad * pad

    def block(self, work_shape: tuple[int, int]) -> tuple[int, int]:
        return self.granularity.block(work_shape, self.group_size)

    def scale_grid(self, work_shape: tuple[int, int]) -> tuple[int, int]:
        return self.granularity.grid(work_shape, self.group_size)

    @property
    def row_multiple(self) -> int:
        """Slices of rows that begin at multiples of this are quantized and stored on their own."""
        if self.granularity is Granularity.BLOCK:
            return self.group_size
        return 1 if self.pad_to == 1 else 128  # the swizzle's tile

    @property
    def smallest_shape(self) -> tuple[int, int]:
        """[N, K] of the smallest weight that the format takes."""
        group = self.group_size if self.group_size is not None and self.pad_to == 1 else 1
        rows = group if self.granularity is Granularity.BLOCK else 1
        per_byte = 8 // self.element.bits if self.pad_to == 1 else 1
        return rows, math.lcm(group, self.rotation or 1, self.k_multiple, per_byte)

    @abstractmethod
    def tensor_specs(self, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        """The tensors of one layer as written, the weight first, `comfy_quant` excepted. shape: the weight's [N, K]."""

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        """Of `tensor_specs`; they do not depend on the shape."""
        return tuple(spec.suffix for spec in self.tensor_specs(self.smallest_shape))

    def config(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        """The `comfy_quant` JSON object of a layer whose source weight had this shape and dtype."""
        return {"format": self.on_disk}

    def input_scale_rule(self, config: Mapping[str, Any]) -> InputScaleRule | None:
        """By what the inputs of a layer with this comfy_quant object are divided; None where its runtime ignores it."""
        return None if config.get("full_precision_matrix_mult") else self.runtime.input_scale

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return sum(spec.nbytes for spec in self.tensor_specs(shape)) * 8 / (shape[0] * shape[1])

    def runtime_params(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fields of comfy-kitchen's Params, dtype and shape excepted, from a layer's tensors as on disk."""
        return {"scale": tensors["weight_scale"]}

    # ---- numerics ----------------------------------------------------------------------------------------------
    def prepare(self, w: Tensor) -> Tensor:
        """float32 [N, K] -> work [Np, Kp]: padded, then rotated. May return w itself; callers must not write into it."""
        n, k = w.shape
        rows, cols = self.work_shape((n, k))
        if (rows, cols) != (n, k):
            w = torch.nn.functional.pad(w, (0, cols - k, 0, rows - n))
        if self.rotation is not None:
            from ..numerics.hadamard import rotate_columns

            rotated = rotate_columns(w, self.rotation)
            if not bool(torch.isfinite(torch.stack(torch.aminmax(rotated))).all()):
                rotated = rotate_columns(w.clamp(-_ROTATABLE, _ROTATABLE), self.rotation)
            w = rotated
        return w

    def restore(self, work: Tensor, shape: tuple[int, int]) -> Tensor:
        """The inverse of prepare."""
        if self.rotation is not None:
            from ..numerics.hadamard import rotate_columns

            work = rotate_columns(work, self.rotation)
        return work[: shape[0], : shape[1]]

    def prepare_hessian(self, h: Tensor) -> Tensor:
        """float32 [K, K], X^T X of the layer's inputs -> the same for the work weight's columns [Kp, Kp]. May overwrite h."""
        pad = self.work_shape((1, h.shape[0]))[1] - h.shape[0]
        if pad:
            h = torch.nn.functional.pad(h, (0, pad, 0, pad))
        if self.rotation is not None:
            from ..numerics.hadamard import rotate_hessian

            rotate_hessian(h, self.rotation)
        return h

    def absmax(self, work: Tensor) -> QParams:
        """The default scales: the block's largest magnitude lands on the element's largest value."""
        return self.qparams(divide(block_absmax(work, self.block(tuple(work.shape))), self.element.max))

    def absmax_under(self, rows: Tensor, largest: Tensor) -> QParams:
        """absmax for some rows of a work weight whose largest magnitude is `largest`, float32 ()."""
        if self.granularity is Granularity.TENSOR:
            return self.qparams(divide(largest, self.element.max).reshape(1, 1))
        return self.absmax(rows)

    def qparams(self, effective: Tensor, like: QParams | None = None) -> QParams:
        """Wished effective scales [NB, KB], float32 >= 0 -> storable ones. like: whose parent, zero, codebook to keep."""
        scale = torch.where(effective > 0, effective.clamp(SCALE_FLOOR), torch.ones_like(effective))
        return QParams(self.scale_dtype.snap(scale))

    def encode(self, work: Tensor, qp: QParams) -> Tensor:
        """Nearest codes [Np, Kp] under these scales. Values already on the grid keep their codes.

        For a part of a weight: of a whole one on a GPU it takes up to four copies, and `tiles.encode_rows` one slice.
        """
        work = work.contiguous()
        block, scale = self.block(tuple(work.shape)), qp.effective()
        codes = torch.empty(work.shape, dtype=self.element.dtype, device=work.device)
        for rows, blocks in self._slices(work, block):
            x = self._to_units(block_view(work[rows], self._slice_block(block, rows)), scale[blocks][:, None, :, None])
            codes[rows] = self.element.encode(x).view(-1, work.shape[1])
        return codes

    def _to_units(self, view: Tensor, scale: Tensor) -> Tensor:
        """Weights -> multiples of the scale. Division: the correctly rounded quotient."""
        return view / scale

    def decode(self, codes: Tensor, qp: QParams) -> Tensor:
        """codes [Np, Kp] -> float32 work weight, value = element * effective scale."""
        block, scale = self.block(tuple(codes.shape)), qp.effective()
        work = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows, blocks in self._slices(codes, block):
            view = block_view(self.element.decode(codes[rows]), self._slice_block(block, rows))
            work[rows] = (view * scale[blocks][:, None, :, None]).view(-1, codes.shape[1])
        return work

    def round(self, work: Tensor, qp: QParams) -> Tensor:
        """Round to nearest: float32 [Np, Kp], every value exactly what decode gives."""
        return self.decode(self.encode(work, qp), qp)

    @staticmethod
    def _slices(work: Tensor, block: tuple[int, int]):
        """Row slices of the weight and of the scale grid: whole on a GPU, cache-sized on a CPU."""
        poll()
        n, k = work.shape
        if work.is_cuda or n * k <= _CPU_SLICE:
            yield slice(0, n), slice(0, n // block[0])
            return
        if block[0] == n and n > 1:  # one scale for all rows: any slice has the same block row
            step = max(1, _CPU_SLICE // k)
            for start in range(0, n, step):
                poll()
                yield slice(start, min(start + step, n)), slice(0, 1)
            return
        step = max(1, _CPU_SLICE // (k * block[0])) * block[0]
        for start in range(0, n, step):
            poll()
            stop = min(start + step, n)
            yield slice(start, stop), slice(start // block[0], stop // block[0])

    @staticmethod
    def _slice_block(block: tuple[int, int], rows: slice) -> tuple[int, int]:
        return min(block[0], rows.stop - rows.start), block[1]

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
        """Ascending float32 [L] where every weight decodes to level * effective scale; None with zero points or own codebooks."""
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

    # ---- disk --------------------------------------------------------------------------------------------------
    @abstractmethod
    def pack(self, codes: Tensor, qp: QParams, shape: tuple[int, int]) -> dict[str, Tensor]:
        """codes [Np, Kp] and scales -> {suffix: tensor} exactly as `tensor_specs(shape)` says."""

    @abstractmethod
    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, QParams]:
        """The inverse of pack."""

    def shape_from(self, tensors: dict[str, tuple[int, ...]], config: dict[str, Any]) -> tuple[int, int]:
        """The logical [N, K] of a stored layer, from its tensors' shapes and its JSON."""
        recorded = config.get("orig_shape") or config.get("shape")
        if recorded:
            return int(recorded[0]), int(recorded[1])
        stored = tensors["weight"]
        return stored[0], stored[1] * (8 // self.element.bits)

    def accepts(self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Format | None:
        """This format with the options a stored layer uses, or None when the layer is another variant."""
        fmt = self
        if self.group_sizes and config.get("group_size"):
            fmt = replace(fmt, group_size=int(config["group_size"]))
        if self.rotations and config.get("convrot_groupsize"):
            fmt = replace(fmt, rotation=int(config["convrot_groupsize"]))
        return fmt

    def recognise(self, infos: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """The comfy_quant object of a layer that has lost it; None when its tensors are not this format's, or do not tell.

        infos: {suffix: header entry}, the weight's among them, with two dimensions.
        """
        return None

    def modelopt_order_fits(self, infos: Mapping[str, TensorInfo]) -> bool:
        """Whether ModelOpt's order of the same tensors has these shapes too; for formats with `modelopt_differs`."""
        return False

    def decoding_error(self, work: Tensor, codes: Tensor, qp: QParams) -> float:
        """Relative Frobenius error of the decoded codes against the work weight; on a CPU slice by slice, in the cache."""
        wrong = total = 0.0
        for rows, blocks in self._slices(work, self.block(tuple(work.shape))):
            reference = work[rows]
            decoded = self.decode(codes[rows], qp.rows(blocks))
            wrong += float(decoded.sub_(reference).norm()) ** 2
            total += float(reference.norm()) ** 2
        if not math.isfinite(wrong + total):  # squares of 1e20 and above
            return relative_error(work, self.decode(codes, qp))
        return math.sqrt(wrong / total) if total else math.sqrt(wrong) and math.inf

    # ---- the whole way -----------------------------------------------------------------------------------------
    def quantize(self, w: Tensor) -> dict[str, Tensor]:
        """Round to nearest with absmax scales: float [N, K] -> {suffix: tensor}."""
        work = self.prepare(w.to(torch.float32))
        qp = self.absmax(work)
        return self.pack(self.encode(work, qp), qp, tuple(w.shape))

    def dequantize(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """{suffix: tensor} -> float32 [N, K], in the original basis."""
        return self.restore(self.decode(*self.unpack(tensors, shape)), shape)
