"""W4A8: 4-bit codes into a codebook whose scaled levels are themselves rounded to int8, in a rotated basis.

weight = clamp(round(codebook[code] * s_rel), -127, 127) * s_channel, then rotated back. The grid of a group of 16
weights therefore depends on its scale, so this format brings its own rounding instead of an element times a scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..numerics.elements import CodebookElement
from ..numerics.packing import pack_nibbles, unpack_nibbles
from ..numerics.ranks import look_up, rank_table
from ..numerics.scale_dtypes import SCALE_E4M3
from ..numerics.scales import Granularity, QParams, divide, given, shape_of
from ..numerics.slices import row_slices
from .families.rotated import RotatedFormat
from .records import ColumnGrid, KernelLimits, Runtime, TensorSpec

# Lloyd-Max levels of an absmax-normalised Gaussian group of 16, the table comfy-kitchen's kernels have built in.
DEFAULT_CODEBOOK = CodebookElement(
    "w4a8",
    (
        -0.980602,
        -0.794529,
        -0.638165,
        -0.500986,
        -0.377321,
        -0.263187,
        -0.155210,
        -0.050720,
        0.052541,
        0.156985,
        0.265284,
        0.379533,
        0.502636,
        0.638953,
        0.794876,
        0.980671,
    ),
)

Self = TypeVar("Self", bound="W4A8")

_TINY = 1e-8  # floors of the reference encoder
_SCALE_PASSES = 2  # alternations of codes and least-squares group scales
_GAUSSIAN_KURTOSIS = -0.1  # excess kurtosis of the normalised groups above which a table is fitted
_KURTOSIS_SAMPLE = 1 << 19
_FIT_SAMPLE = 300_000
_ROW_SAMPLE = 1 << 22
_SMALLEST_GAP = 1e-3
_SLICE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class W4A8(RotatedFormat):
    """A group of zeros gets the smallest scale, and decodes to at most 1e-8."""

    rows_are_independent: bool = False  # the codebook is chosen from all of them

    def tensor_specs(self, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        n, k = shape
        return (
            TensorSpec("weight", torch.int8, (n, k // 2)),
            TensorSpec("weight_s_rel", torch.float8_e4m3fn, (n, k // self.group)),
            TensorSpec("weight_s_channel", torch.float32, (n,)),
            TensorSpec("weight_codebook", torch.float32, (16,), row_axis=None, optional=True, signed=True),
        )

    def config(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        return {**super().config(shape, dtype), "group_size": self.group_size, "convrot_groupsize": self.rotation}

    # ---- scales ------------------------------------------------------------------------------------------------
    def absmax(self, work: Tensor) -> QParams:
        """Least-squares group scales that start from absmax, as the reference encoder chooses them."""
        table = choose_codebook(work, self.group)
        parts = [self._fit_scales(work[rows], table) for rows in row_slices(shape_of(work), _SLICE)]
        return QParams(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), codebook=table)

    def _fit_scales(self, rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        grouped = rows.view(rows.shape[0], -1, self.group)
        scale = grouped.abs().amax(dim=-1, keepdim=True).clamp(min=_TINY)
        levels = look_up(table, _nearest(grouped / scale, table))
        for _ in range(_SCALE_PASSES):
            scale = (
                (grouped * levels).sum(-1, keepdim=True) / (levels * levels).sum(-1, keepdim=True).clamp(min=_TINY)
            ).clamp(min=_TINY)
            levels = look_up(table, _nearest(grouped / scale, table))
        channel = divide((levels * scale).abs().amax(dim=(1, 2)), 127.0).clamp(min=_TINY)[:, None]
        return self.scale_dtype.snap(scale.squeeze(-1) / channel), channel

    def qparams(self, effective: Tensor, like: QParams | None = None) -> QParams:
        if like is None:
            table = torch.tensor(DEFAULT_CODEBOOK.table, device=effective.device)
            channel = divide(effective.amax(dim=1, keepdim=True) * table.abs().max(), 127.0).clamp(min=_TINY)
        else:
            table, channel = given(like.codebook), given(like.parent)
        return QParams(self.scale_dtype.snap((effective / channel).clamp(min=2.0**-9)), channel, codebook=table)

    # ---- codes -------------------------------------------------------------------------------------------------
    @staticmethod
    def _levels(scale: Tensor, table: Tensor) -> Tensor:
        """scale: s_rel, any shape -> the 16 int8 levels of each, float32 [..., 16], ascending."""
        return (scale[..., None] * table).round_().clamp_(-127, 127)

    def encode(self, work: Tensor, qp: QParams) -> Tensor:
        shape, table, channel = shape_of(work), given(qp.codebook), given(qp.parent)
        codes = torch.empty(shape, dtype=torch.uint8, device=work.device)
        for rows in row_slices(shape, _SLICE):
            levels = self._levels(qp.scale[rows], table).view(-1, 16)
            units = (work[rows] / channel[rows]).view(-1, self.group)
            codes[rows] = _nearest_of(units, levels).to(torch.uint8).view(-1, shape[1])
        return codes

    def decode(self, codes: Tensor, qp: QParams) -> Tensor:
        n, k = codes.shape
        table, channel = given(qp.codebook), given(qp.parent)
        work = torch.empty((n, k), dtype=torch.float32, device=codes.device)
        for rows in row_slices((n, k), _SLICE):
            values = look_up(table, codes[rows]).view(-1, k // self.group, self.group)
            units = (values * qp.scale[rows, :, None]).round_().clamp_(-127, 127)
            work[rows] = units.view(-1, k) * channel[rows]
        return work

    def round_columns(self, columns: Tensor, qp: QParams, start: int, work_shape: tuple[int, int]) -> Tensor:
        levels, units = self._column_levels(columns, qp, start, work_shape)
        index = _nearest_of(units.reshape(-1, 1), levels.reshape(-1, 16))
        return torch.gather(levels.reshape(-1, 16), 1, index).view(columns.shape) * given(qp.parent)

    def bracket_columns(
        self, columns: Tensor, qp: QParams, start: int, work_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        levels, units = self._column_levels(columns, qp, start, work_shape)
        flat, x = levels.reshape(-1, 16), units.reshape(-1, 1).contiguous()
        x = torch.maximum(torch.minimum(x, flat[:, -1:]), flat[:, :1])
        above = torch.searchsorted(flat, x).clamp_(max=15)
        hi = torch.gather(flat, 1, above)
        lo = torch.where(hi == x, hi, torch.gather(flat, 1, (above - 1).clamp_(min=0)))
        channel = given(qp.parent)
        return lo.view(columns.shape) * channel, hi.view(columns.shape) * channel

    def levels(self, device: torch.device) -> Tensor | None:
        return None

    def column_grid(self, qp: QParams, columns: Tensor, work_shape: tuple[int, int]) -> ColumnGrid:
        levels = self._levels(self._gather_columns(qp.scale, columns, work_shape), given(qp.codebook))
        return ColumnGrid(levels.contiguous(), given(qp.parent).expand(work_shape[0], columns.numel()))

    def _column_levels(
        self, columns: Tensor, qp: QParams, start: int, work_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        scale = self._expand_columns(qp.scale, start, start + columns.shape[1], work_shape)
        return self._levels(scale, given(qp.codebook)).contiguous(), columns / given(qp.parent)

    # ---- disk --------------------------------------------------------------------------------------------------
    def pack(self, codes: Tensor, qp: QParams, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {
            "weight": pack_nibbles(codes, high_first=False).view(torch.int8),
            "weight_s_rel": self.scale_dtype.store(qp.scale),
            "weight_s_channel": given(qp.parent).reshape(-1).contiguous(),
            "weight_codebook": given(qp.codebook).clone(),
        }

    def runtime_params(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        codebook = {"codebook": tensors["weight_codebook"]} if "weight_codebook" in tensors else {}
        return {
            "scale": tensors["weight_s_rel"],
            "s_channel": tensors["weight_s_channel"],
            "group_size": self.group_size,
            "convrot_groupsize": self.rotation,
            **codebook,
        }

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, QParams]:
        table = tensors.get("weight_codebook")
        if table is None:  # uniform codes: value = code - 8
            table = torch.arange(-8, 8, device=tensors["weight"].device)
        return (
            unpack_nibbles(tensors["weight"], high_first=False),
            QParams(
                self.scale_dtype.load(tensors["weight_s_rel"]),
                tensors["weight_s_channel"].to(torch.float32).reshape(-1, 1),
                codebook=table.to(torch.float32),
            ),
        )

    def accepts(self: Self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Self | None:
        fmt = super().accepts(config, shapes)
        weight, rel = shapes["weight"], shapes.get("weight_s_rel")
        # A 6-bit variant of the same name has rows of 3K / 4 bytes; it is not written or read here.
        if fmt is None or rel is None or weight[1] * 2 != rel[1] * fmt.group:
            return None
        return fmt


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest of the 16 sorted values, int32. The two differences decide; a tie goes to the lower one."""
    above = rank_table(tuple(table.tolist()), str(x.device)).rank(x).to(torch.int32)
    lo, hi = (above - 1).clamp_(min=0), above.clamp_(max=table.numel() - 1)
    closer = look_up(table, hi).sub_(x).abs_() < look_up(table, lo).sub_(x).abs_()
    return torch.where(closer, hi, lo)


def _nearest_of(x: Tensor, levels: Tensor) -> Tensor:
    """x [R, C], levels [R, 16] ascending per row -> int64 [R, C]; a tie goes to the lower level."""
    above = torch.searchsorted(levels, x.contiguous())
    lo, hi = (above - 1).clamp_(min=0), above.clamp(max=levels.shape[1] - 1)
    closer = (torch.gather(levels, 1, hi) - x).abs_() < (x - torch.gather(levels, 1, lo)).abs_()
    return torch.where(closer, hi, lo)


def choose_codebook(work: Tensor, group_size: int) -> Tensor:
    """float32 [16]: the built-in table, or a fitted one when the rotated, normalised groups stay heavy-tailed."""
    n, k = work.shape
    rows = max(1, _ROW_SAMPLE // k)
    if n > rows:
        work = work.index_select(0, torch.linspace(0, n - 1, rows).long().to(work.device))
    grouped = work.view(work.shape[0], -1, group_size)
    flat = (grouped / grouped.abs().amax(dim=-1, keepdim=True).clamp(min=_TINY)).flatten()
    x = _sample(flat, _KURTOSIS_SAMPLE)
    kurtosis = ((x - x.mean()) / (x.std() + 1e-9)).pow(4).mean() - 3.0
    default = torch.tensor(DEFAULT_CODEBOOK.table, dtype=torch.float32, device=work.device)
    if not float(kurtosis) > _GAUSSIAN_KURTOSIS:
        return default
    fitted = _lloyd_max(_sample(flat, _FIT_SAMPLE))
    # Where half of the groups are zeros, say, the fit leaves levels on top of each other or out of order.
    return fitted if float(fitted.diff().min()) > _SMALLEST_GAP else default


def _sample(flat: Tensor, count: int) -> Tensor:
    if flat.numel() <= count:
        return flat
    generator = torch.Generator().manual_seed(0)  # on the CPU, so that every device draws the same rows
    return flat[torch.randint(0, flat.numel(), (count,), generator=generator).to(flat.device)]


def _lloyd_max(samples: Tensor, iterations: int = 25) -> Tensor:
    """k-means in one dimension from the quantiles: 16 ascending levels."""
    levels = torch.quantile(samples, torch.linspace(0, 1, 16, device=samples.device))
    for _ in range(iterations):
        nearest = (samples[:, None] - levels).abs().argmin(-1)
        means = levels.clone()
        for index in range(16):
            members = samples[nearest == index]
            if members.numel():
                means[index] = members.mean()
        levels = means
    return levels.contiguous()


FORMAT = W4A8(
    name="asym_w4a8_int8",
    on_disk="asym_w4a8_int8",
    title="W4A8 (codebook over int8, rotated)",
    element=DEFAULT_CODEBOOK,
    granularity=Granularity.GROUP,
    group_size=16,
    group_sizes=(16,),
    rotation=256,
    rotations=(256,),
    k_multiple=16,
    scale_dtype=SCALE_E4M3,
    runtime=Runtime(
        "AsymW4A8Int8Layout",
        native_since="0.30",
        min_capability=(8, 0),
        quantizes_input=True,
        # comfy-kitchen 0.2.40: "convrot fused kernel only supports group_size 256", whatever the number of rows
        limits=KernelLimits(rotations=(256,)),
    ),
    # half the largest gap (0.186 of 0.98) with least-squares scales that may clip the largest weight, E4M3's 1/16
    error_bound=0.35,
    tensor_bound=1 / 127,
    source="comfy-kitchen quantize_w4a8_int8_weight (eager, 4 bit, symmetric, codebook)",
)
