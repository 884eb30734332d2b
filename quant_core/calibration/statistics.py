"""Streaming statistics of one layer's inputs. Everything adds: over calls, over runs, over files.

Nothing here waits for the GPU, except a Hessian that lies elsewhere (hessian.py says which). A call costs three small
kernels: the rest waits until a thousand rows have come together, for at a few rows a call it is launches that cost.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError
from .hessian import FullHessian, HessianKind, Placement, SketchHessian
from .histogram import count_into, new_histogram, percentile
from .reservoir import Reservoir
from .selection import Part


@dataclass(frozen=True, slots=True)
class StatisticsSettings:
    """staged_rows: rows gathered before they are worked into the sums. histogram_rows: how many of these the percentile
    histogram counts (counting is slow on a GPU). reservoir_rows: held-out rows kept. sketch_size: rows of a sketch.
    """

    staged_rows: int = 1024
    histogram_rows: int = 128
    reservoir_rows: int = 128
    sketch_size: int = 256

    def __post_init__(self) -> None:
        for name, least in (("staged_rows", 1), ("histogram_rows", 1), ("reservoir_rows", 0), ("sketch_size", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} is {getattr(self, name)}; at least {least} is needed.")


class LayerStatistics:
    """What is known of the inputs x [rows, K] of a layer.

    Over all rows seen: `seen` (a count) and `absmax`, float32 [K].
    Over the sampled rows, each with its weight: `weight`, `square_sum`, `sum` (float64), the Hessian.
    `count` is the number of sampled finite rows, `nonfinite` that of rows left out because they held NaN or Inf.
    `histogram` (unweighted) and `reservoir` (rows that are in no other statistic but absmax): see their modules.
    `labels` counts sampled rows by label ("cond", "uncond"). Staged rows show in none of them before `flush`.
    """

    def __init__(self, in_features: int, device: torch.device | str, kind: HessianKind = HessianKind.FULL,
                 placement: Placement = Placement.DEVICE, settings: StatisticsSettings = StatisticsSettings(),
                 folder: Path | None = None, name: str = "hessian") -> None:
        self.in_features, self.settings, self.kind = in_features, settings, kind
        self.device = torch.device(device)
        # Sums of thousands of calls; MPS has no float64.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.seen = 0
        self.labels: dict[str, int] = {}
        self.absmax = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.sum = torch.zeros(in_features, dtype=wide, device=device)
        self.square_sum = torch.zeros(in_features, dtype=wide, device=device)
        self.weight = torch.zeros((), dtype=wide, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self.histogram = new_histogram(device)
        self.reservoir = Reservoir(settings.reservoir_rows, in_features, device)
        self.hessian: FullHessian | SketchHessian | None = None
        if kind is HessianKind.FULL:
            self.hessian = FullHessian(in_features, device, placement, folder, name)
        elif kind is HessianKind.SKETCH:
            where = "cpu" if placement is Placement.HOST else device
            self.hessian = SketchHessian(in_features, settings.sketch_size, where)
        self._staged: Tensor | None = None
        self._parts: list[Part] = []
        self._fill = 0

    def see(self, x: Tensor) -> None:
        """Let every row count for the absmax. x: [rows, K] of any float dtype. NaN is passed over, Inf is not."""
        if len(x):
            largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=0)
            torch.fmax(self.absmax, largest.to(self.device, torch.float32), out=self.absmax)
            self.seen += len(x)

    def stage(self, x: Tensor, index: Tensor, parts: Sequence[Part]) -> None:
        """Take rows now, work them in later (`flush`). x: [rows, K]. index: int64 on x's device; parts: what they are."""
        for part in parts:
            if part.keys is None:
                self.labels[part.label] = self.labels.get(part.label, 0) + part.count
        size = max(self.settings.staged_rows, len(index))
        if self._staged is not None and (self._fill + len(index) > len(self._staged) or self._staged.dtype is not x.dtype):
            self.flush()
        if self._staged is None:
            self._staged = torch.empty(size, self.in_features, dtype=x.dtype, device=self.device)
        target = self._staged[self._fill:self._fill + len(index)]
        if x.device == self.device:
            torch.index_select(x, 0, index, out=target)
        else:
            target.copy_(x[index])
        self._parts += parts
        self._fill += len(index)

    def flush(self) -> None:
        """Work the staged rows in, and free their memory."""
        if self._staged is None:
            return
        fitted: dict[float, list[Tensor]] = {}
        held: list[tuple[Tensor, Tensor]] = []
        for part, rows in zip(self._parts, self._staged[:self._fill].split([part.count for part in self._parts])):
            if part.keys is None:
                fitted.setdefault(part.weight, []).append(rows)
            else:
                held.append((rows, part.keys))
        self._staged, self._parts, self._fill = None, [], 0
        for weight, pieces in fitted.items():
            self._work_in(torch.cat(pieces), weight)
        if held:
            keys = torch.cat([keys for _, keys in held])
            self.hold_out(torch.cat([rows for rows, _ in held]), torch.arange(len(keys), device="cpu"), keys)

    def add(self, x: Tensor, weight: float = 1.0, label: str = "") -> None:
        """Sampled rows into everything but the absmax and the reservoir, at once. x: [n, K]."""
        self.labels[label] = self.labels.get(label, 0) + len(x)
        self._work_in(x.to(self.device), weight)

    def _work_in(self, x: Tensor, weight: float) -> None:
        finite = torch.isfinite(x).all(dim=1)
        x = torch.where(finite[:, None], x, 0.0)
        rows = x.to(torch.float32)
        good = finite.sum()
        self.count += good
        self.nonfinite += len(x) - good
        self.weight.add_(good, alpha=weight)
        self.sum.add_(rows.sum(dim=0), alpha=weight)
        self.square_sum.add_(rows.square().sum(dim=0), alpha=weight)
        step = max(1, len(rows) // self.settings.histogram_rows)
        count_into(self.histogram, rows[::step][:self.settings.histogram_rows])
        if self.hessian is not None and len(x):
            self.hessian.add(x, weight)

    def hold_out(self, x: Tensor, index: Tensor, keys: Tensor) -> None:
        """Offer rows of x [rows, K] for judging: index int64 [m] and keys float32 [m] (reservoir.py), on the CPU."""
        if self.reservoir.size:
            self.reservoir.offer(x, index, keys)

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

    def merge(self, other: "LayerStatistics", layer: str) -> None:
        """Add another capture of the same layer. layer: for messages. RequestError when kinds or widths differ."""
        if other.in_features != self.in_features:
            raise RequestError(f"{layer}: in_features is {self.in_features} in one calibration and "
                               f"{other.in_features} in the other. They belong to different models.")
        if other.kind is not self.kind:
            raise RequestError(f"{layer}: one calibration holds a {self.kind.value} Hessian, the other a "
                               f"{other.kind.value} one. Capture both with the same memory budget.")
        self.flush()
        other.flush()
        self.seen += other.seen
        for label, rows in other.labels.items():
            self.labels[label] = self.labels.get(label, 0) + rows
        torch.maximum(self.absmax, other.absmax.to(self.device), out=self.absmax)
        for field in ("sum", "square_sum", "weight", "count", "nonfinite", "histogram"):
            getattr(self, field).add_(getattr(other, field).to(self.device))
        if self.reservoir.size and other.reservoir.size:
            self.reservoir.merge(other.reservoir)
        if self.hessian is not None:
            self.hessian.merge(other.hessian)
