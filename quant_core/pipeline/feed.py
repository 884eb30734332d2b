"""What each layer is quantized from.

That is its weight, what a calibration knows of its inputs, and, beside the running model, what the layers before it
deliver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..algorithms.asymmetric import InputPairs
from ..calibration.use import LayerInputs, OpenCalibration
from ..cancel import poll
from ..checkpoint.source import Source
from .in_order.jobs import InOrder, LiveModel, in_order
from .layer import NO_EVIDENCE, LayerResult
from .layer_plan import Quantized
from .plan import Plan


@dataclass(frozen=True, slots=True)
class JobData:
    """One layer's data, all on the CPU but for the pairs. w: [N, K]. bias: [N], only when it is to be corrected."""

    w: Tensor
    bias: Tensor | None = None
    inputs: LayerInputs = field(default_factory=lambda: LayerInputs(NO_EVIDENCE))
    pairs: InputPairs | None = None


class Feed(Protocol):
    """Gives the layers one by one, with their data. `deliver` each result before the next layer is taken."""

    def __iter__(self) -> Iterator[tuple[Quantized, JobData]]: ...

    def deliver(self, job: Quantized, data: JobData, result: LayerResult) -> None: ...


@contextmanager
def open_feed(
    plan: Plan, src: Source, calibration: OpenCalibration | None = None, live: LiveModel | None = None
) -> Iterator[Feed]:
    """In the file's order; beside the running model in the order in which that uses the layers.

    live: needs the calibration that was captured from it.
    """

    def read(job: Quantized) -> JobData:
        return read_job(src, job, calibration)

    if live is not None and calibration is not None:
        with in_order(plan.quantized, calibration.known_as, live) as order:
            yield _LiveFeed(order, read, src)
    else:
        with ThreadPoolExecutor(1, "quantpress-read") as reader:
            yield _FileFeed(plan.quantized, read, reader)


class _FileFeed:
    """Reads one layer ahead."""

    def __init__(
        self, jobs: Sequence[Quantized], read: Callable[[Quantized], JobData], reader: ThreadPoolExecutor
    ) -> None:
        self._jobs, self._read, self._reader = jobs, read, reader

    def __iter__(self) -> Iterator[tuple[Quantized, JobData]]:
        ahead: Future[JobData] = self._reader.submit(self._read, self._jobs[0])
        for job, following in zip(self._jobs, (*self._jobs[1:], None), strict=True):
            data = ahead.result()
            if following is not None:
                ahead = self._reader.submit(self._read, following)
            yield job, data

    def deliver(self, job: Quantized, data: JobData, result: LayerResult) -> None:
        """In a file no layer depends on another."""


class _LiveFeed:
    """Reads when the running model has got to the layer, which then goes on with what was made of it."""

    def __init__(self, order: InOrder, read: Callable[[Quantized], JobData], src: Source) -> None:
        self._order, self._read, self._src = order, read, src

    def __iter__(self) -> Iterator[tuple[Quantized, JobData]]:
        for ordered in self._order:
            yield ordered.job, replace(self._read(ordered.job), pairs=ordered.pairs)

    def deliver(self, job: Quantized, data: JobData, result: LayerResult) -> None:
        if data.pairs is not None:
            self._order.deliver(job.layer, _decoded(job, result), self._bias(job, data, result))

    def _bias(self, job: Quantized, data: JobData, result: LayerResult) -> Tensor | None:
        """The bias [N] beside the result; None where the layer has none."""
        if result.bias is not None or data.bias is not None:
            return data.bias if result.bias is None else result.bias
        name = f"{job.layer}.bias"
        return self._src.read(name) if name in self._src.tensors else None


def _decoded(job: Quantized, result: LayerResult) -> Tensor:
    """float32 [N, K]: what a reader makes of the result, with the low-rank part that is loaded beside it."""
    weight, residual = job.recipe.format.dequantize(result.tensors, job.shape), result.residual
    return weight if residual is None else weight + (residual.up.float() @ residual.down.float()).to(weight.device)


def read_job(src: Source, job: Quantized, calibration: OpenCalibration | None) -> JobData:
    w = read_weight(src, job)
    if calibration is None:
        return JobData(w)
    hessian = not job.recipe.plain or job.gets_low_rank_part
    bias = None if job.bias is None else src.read(job.bias)
    return JobData(w, bias, calibration.read(job.layer, job.recipe.format, job.config, hessian))


def read_weight(src: Source, job: Quantized) -> Tensor:
    """The layer's weight [N, K] on the CPU: as stored, or decoded with its own scales (float32)."""
    return job.stored.decode(src) if job.stored is not None else src.read(f"{job.layer}.weight")


def count_nonfinite(w: Tensor) -> int:
    """How many values are NaN or Inf; one fast pass when none is."""
    if w.dtype.itemsize == 1:
        w = w.to(torch.float32)
    lowest, highest = torch.aminmax(w)
    if bool(torch.isfinite(lowest)) and bool(torch.isfinite(highest)):
        return 0
    return int((~torch.isfinite(w)).sum())


def nonfinite_reason(src: Source, job: Quantized) -> str | None:
    """Why a layer with NaN or Inf cannot be quantized; None when all its values are finite. Reads the weight."""
    poll()
    count = count_nonfinite(read_weight(src, job))
    return f"{count} values are NaN or Inf" if count else None
