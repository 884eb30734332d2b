"""Streaming statistics of one layer's inputs. Everything adds: over calls, over runs, over files.

Nothing here waits for the GPU, except a Hessian that lies elsewhere (hessian.py says which). A call costs two small
kernels: the rest waits until enough rows have come together (staging.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import RequestError
from .hessian import FullHessian, HessianKind, Placement, SketchHessian
from .histogram import count_into, new_histogram, percentile
from .reservoir import Reservoir
from .selection import Part
from .staging import LargestValues, StagedRows

PLAIN_FIELDS = ("absmax", "sum", "square_sum", "weight", "count", "nonfinite", "histogram")


@dataclass(frozen=True, slots=True)
class StatisticsSettings:
    """staged_rows: rows gathered before they are worked into the sums; half as many where no Hessian is kept, whose
    product is what wants many at once. histogram_rows: how many of these the percentile histogram counts.
    reservoir_rows: held-out rows kept. sketch_size: rows of a sketch.
    """

    staged_rows: int = 1024
    histogram_rows: int = 128
    reservoir_rows: int = 128
    sketch_size: int = 256

    def __post_init__(self) -> None:
        for name, least in (("staged_rows", 1), ("histogram_rows", 1), ("reservoir_rows", 0), ("sketch_size", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} is {getattr(self, name)}; at least {least} is needed.")

    def staged(self, kind: HessianKind) -> int:
        """Rows that a layer which keeps this kind of Hessian gathers."""
        return self.staged_rows if kind is not HessianKind.DIAGONAL else (self.staged_rows + 1) // 2


class LayerStatistics:
    """What is known of the inputs x [rows, K] of a layer.

    Over all rows seen: `seen` (a count) and `absmax`, float32 [K].
    Over the sampled rows, each with its weight: `weight`, `square_sum`, `sum` (float64), the Hessian.
    `count` is the number of sampled finite rows, `nonfinite` that of rows left out because they held NaN or Inf.
    `histogram` (unweighted) and `reservoir` (rows that are in no other statistic but absmax): see their modules.
    `labels` counts sampled rows by label ("cond", "uncond"). Staged rows show in none of them before `flush`.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str,
        kind: HessianKind = HessianKind.FULL,
        placement: Placement = Placement.DEVICE,
        settings: StatisticsSettings = StatisticsSettings(),
        folder: Path | None = None,
        name: str = "hessian",
    ) -> None:
        self.in_features, self.settings, self.kind = in_features, settings, kind
        self.device = torch.device(device)
        # Sums of thousands of calls; MPS has no float64.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.seen = 0
        self.labels: dict[str, int] = {}
        self._largest = LargestValues(in_features, self.device)
        self.sum = torch.zeros(in_features, dtype=wide, device=device)
        self.square_sum = torch.zeros(in_features, dtype=wide, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        # What was offered is known without looking; what was left out of it is not.
        self._offered, self._offered_weight = 0, 0.0
        self._lost_weight = torch.zeros((), dtype=wide, device=device)
        self.histogram = new_histogram(device)
        self.reservoir = Reservoir(settings.reservoir_rows, in_features, device)
        self.hessian: FullHessian | SketchHessian | None = None
        if kind is HessianKind.FULL:
            self.hessian = FullHessian(in_features, device, placement, folder, name)
        elif kind is HessianKind.SKETCH:
            where = "cpu" if placement is Placement.HOST else device
            self.hessian = SketchHessian(in_features, settings.sketch_size, where)
        self._staged = StagedRows(settings.staged(kind), in_features, self.device)

    @property
    def absmax(self) -> Tensor:
        """float32 [K], the accumulator itself."""
        return self._largest.total()

    @property
    def count(self) -> Tensor:
        """int64 []: sampled rows in the sums."""
        return self._offered - self.nonfinite

    @property
    def weight(self) -> Tensor:
        """float []: theirs."""
        return self._offered_weight - self._lost_weight

    def see(self, x: Tensor) -> None:
        """Let every row count for the absmax. x: [rows, K] of any float dtype. NaN is passed over, Inf is not."""
        rows = x.shape[0]
        if rows:
            self._largest.see(x)
            self.seen += rows

    def stage(self, x: Tensor, index: Tensor, parts: Sequence[Part]) -> None:
        """Take rows now, work them in later (`flush`).

        x: [rows, K]. index: int64 on x's device. parts: what they are.
        """
        for part in parts:
            if part.keys is None:
                self.labels[part.label] = self.labels.get(part.label, 0) + part.count
        if not self._staged.fits(x, index.numel()):
            self.flush()
        self._staged.put(x, index, parts)

    def flush(self) -> None:
        """Work the staged rows in, and free their memory."""
        staged = self._staged.take()
        if staged is None:
            return
        rows, parts = staged
        counts = torch.tensor([part.count for part in parts], device="cpu")
        is_held = torch.tensor([part.keys is not None for part in parts], device="cpu").repeat_interleave(counts)
        held, keys = is_held.nonzero().flatten(), [part.keys for part in parts if part.keys is not None]
        entering, slots = (
            self.reservoir.choose(torch.cat(keys)) if keys and self.reservoir.size else (held[:0], held[:0])
        )
        counted = self._even_choice((~is_held).nonzero().flatten())
        # One transfer for all the indices, as each costs as much as a kernel.
        pieces = [held, held[entering], slots, counted]
        held, kept, slots, counted = (
            torch.cat(pieces).to(self.device, non_blocking=True).split([len(piece) for piece in pieces])
        )
        if len(slots):
            self.reservoir.place(rows[kept], slots)
        weights = {part.weight for part in parts if part.keys is None}
        if len(weights) == 1:
            self._work_in(rows, weights.pop(), counted, held)
            return
        split = list(zip(parts, rows.split([part.count for part in parts]), strict=True))
        for weight in sorted(weights):
            self._work_in_all(
                torch.cat([piece for part, piece in split if part.keys is None and part.weight == weight]), weight
            )

    def add(self, x: Tensor, weight: float = 1.0, label: str = "") -> None:
        """Sampled rows into everything but the absmax and the reservoir, at once. x: [n, K]."""
        self.labels[label] = self.labels.get(label, 0) + len(x)
        if len(x):
            self._work_in_all(x.to(self.device, copy=True), weight)

    def _work_in_all(self, x: Tensor, weight: float) -> None:
        self._work_in(
            x, weight, self._even_choice(torch.arange(len(x), device="cpu")).to(self.device, non_blocking=True)
        )

    def _even_choice(self, rows: Tensor) -> Tensor:
        """Of these row numbers, those that the histogram counts."""
        return rows[:: max(1, len(rows) // self.settings.histogram_rows)][: self.settings.histogram_rows]

    def _work_in(self, x: Tensor, weight: float, counted: Tensor, held: Tensor | None = None) -> None:
        """x: [n, K], n > 0, overwritten: rows that do not count become zero.

        counted: rows for the histogram. held: rows to leave out. Both int64 on x's device.
        """
        # A row's sum is finite just if its values are: sums of 16-bit numbers do not overflow float32, nor do those
        # that a model makes.
        bad = x.sum(dim=1, dtype=torch.float32).mul_(0.0).ne(0.0)
        fitted = len(x)
        if held is not None and len(held):
            fitted -= len(held)
            bad.index_fill_(0, held, True)
        x.masked_fill_(bad[:, None], 0.0)
        lost = bad.sum() - (len(x) - fitted)
        self.nonfinite += lost
        self._lost_weight.add_(lost, alpha=weight)
        self._offered, self._offered_weight = self._offered + fitted, self._offered_weight + weight * fitted
        self.sum.add_(x.sum(dim=0, dtype=torch.float32), alpha=weight)
        norm = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32)
        self.square_sum.addcmul_(norm, norm, value=weight)
        count_into(self.histogram, x[counted].to(torch.float32))
        if self.hessian is not None:
            self.hessian.add(x, weight)

    def mean(self) -> Tensor:
        """float32 [K]; zeros when nothing was sampled."""
        return (self.sum / self._divisor()).to(torch.float32)

    def mean_square(self) -> Tensor:
        """float32 [K], the Hessian's diagonal divided by the weight."""
        return (self.square_sum / self._divisor()).to(torch.float32)

    def _divisor(self) -> Tensor:
        return self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)

    def percentile(self, percent: float) -> float:
        """Of |x| over all channels, within histogram.RELATIVE_ERROR; 100 is the true largest magnitude."""
        return percentile(self.histogram, percent, float(self.absmax.max()))

    def hessian_sum(self) -> Tensor | None:
        """float32 [K, K], weighted X^T X (from a sketch: an estimate with the exact diagonal), None if not kept."""
        if isinstance(self.hessian, SketchHessian):
            return self.hessian.total(self.square_sum)
        return None if self.hessian is None else self.hessian.total()

    def merge(self, other: LayerStatistics, layer: str) -> None:
        """Add another capture of the same layer. layer: for messages. RequestError when kinds or widths differ."""
        if other.in_features != self.in_features:
            raise RequestError(
                f"{layer}: in_features is {self.in_features} in one calibration and "
                f"{other.in_features} in the other. They belong to different models."
            )
        require_same_kind(layer, self.kind, other.kind)
        self.flush()
        other.flush()
        self.seen += other.seen
        for label, rows in other.labels.items():
            self.labels[label] = self.labels.get(label, 0) + rows
        self._largest.replace(torch.maximum(self.absmax, other.absmax.to(self.device)))
        self._offered, self._offered_weight = (
            self._offered + other._offered,
            self._offered_weight + other._offered_weight,
        )
        for field in ("sum", "square_sum", "nonfinite", "histogram", "_lost_weight"):
            getattr(self, field).add_(getattr(other, field).to(self.device))
        if self.reservoir.size and other.reservoir.size:
            self.reservoir.merge(other.reservoir)
        match self.hessian, other.hessian:
            case FullHessian() as full, FullHessian() as more:
                full.merge(more)
            case SketchHessian() as sketch, SketchHessian() as rest:
                sketch.merge(rest)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but `seen`, `labels` and the sizes, by the names of storage.py. Waits for the GPU."""
        self.flush()
        found = {field: getattr(self, field) for field in PLAIN_FIELDS}
        found |= {"rows": self.reservoir.rows, "row_keys": self.reservoir.keys}
        return found if self.hessian is None else found | self.hessian.tensors()

    def restore(self, found: Mapping[str, Tensor]) -> None:
        """The inverse of tensors(), for statistics that hold nothing yet."""
        self._largest.replace(found["absmax"].to(self.device))
        for field in ("sum", "square_sum", "nonfinite", "histogram"):
            getattr(self, field).copy_(found[field])
        self._offered, self._offered_weight = int(found["count"] + found["nonfinite"]), float(found["weight"])
        self.reservoir.rows, self.reservoir.keys = found["rows"].to(self.device), found["row_keys"]
        if self.hessian is not None:
            self.hessian.load(found)


def require_same_kind(layer: str, one: HessianKind, other: HessianKind) -> None:
    """RequestError when two captures of a layer keep different things."""
    if one is not other:
        raise RequestError(
            f"{layer}: one calibration holds a {one.value} Hessian, the other a {other.value} one. "
            "Capture both with the same memory budget."
        )
