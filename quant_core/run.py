"""The pipeline: one layer in memory at a time, reading ahead and writing behind while torch computes."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cancel import cancel_scope, poll
from .checkpoint.metadata import encode_config
from .checkpoint.sink import Sink, open_sink
from .checkpoint.source import Source, open_source
from .errors import InputFileError, RequestError
from .layer import NO_EVIDENCE, quantize_layer
from .plan import LayerPlan, Plan, make_plan
from .policy.general import Policy
from .recipe import Evidence, Recipe
from .report import LayerReport, Progress, RunReport
from .verify import check_file

_UNWRITTEN_JOBS = 2      # jobs whose tensors wait for the disk


def convert(source: str | Path, target: str | Path, recipe: Recipe, policy: Policy = Policy(), *,
            device: str | torch.device = "auto", overwrite: bool = False, allow_nonfinite: bool = False,
            never_pack: frozenset[str] = frozenset(), evidence: Mapping[str, Evidence] | None = None,
            progress: Callable[[Progress], None] | None = None, cancel: Callable[[], bool] | None = None) -> RunReport:
    """The whole way from file to verified file. Raises QuantPressError; on any error no target appears.

    allow_nonfinite: a layer with NaN or Inf keeps its source dtype; by default it is an InputFileError.
    progress: called after every tensor. cancel: asked often; true raises Cancelled within a second.
    """
    started = time.monotonic()
    where = pick_device(device)
    with cancel_scope(cancel), open_source(source) as src:
        plan = make_plan(src, recipe, policy, never_pack=never_pack)
        warnings = plan.warnings
        if allow_nonfinite:
            bad = nonfinite_layers(src, plan)
            if bad:
                plan = make_plan(src, recipe, policy, never_pack=never_pack, keep_layers=bad)
                warnings = plan.warnings + tuple(f"{layer}: kept: {why}" for layer, why in bad.items())
        with open_sink(target, plan.outputs, plan.metadata, overwrite=overwrite, sources=src.files) as sink:
            reports = []
            for report, state in run(plan, src, sink, device=where, evidence=evidence or {}, started=started):
                if report is not None:
                    reports.append(report)
                if progress is not None:
                    progress(state)
            src.check_unchanged()
            sink.commit(verify=lambda part: check_file(part).raise_for_errors())
    return RunReport(str(source), str(target), recipe.describe(), tuple(reports), warnings, plan.source_bytes,
                     plan.output_bytes, plan.peak_bytes, time.monotonic() - started, str(where))


def run(plan: Plan, src: Source, sink: Sink, *, device: torch.device, evidence: Mapping[str, Evidence],
        started: float) -> Iterator[tuple[LayerReport | None, Progress]]:
    """Yields after each layer (its report) and after each copied tensor (None); the caller may stop at any point."""
    jobs = plan.quantized
    clock = _Clock(plan, src, started)
    with ExitStack() as stack:
        reader = stack.enter_context(ThreadPoolExecutor(1, "quantpress-read"))
        writer = _Writer(stack.enter_context(ThreadPoolExecutor(1, "quantpress-write")))
        stack.callback(writer.abandon)
        for layer in plan.layers:
            if layer.recipe is None:
                yield _kept(layer), clock.state(layer.layer)
        ahead: Future[Tensor] | None = reader.submit(read_weight, src, jobs[0]) if jobs else None
        for index, job in enumerate(jobs):
            poll()
            w = ahead.result()
            ahead = reader.submit(read_weight, src, jobs[index + 1]) if index + 1 < len(jobs) else None
            yield _quantize(job, w, sink, writer, device, evidence.get(job.layer, NO_EVIDENCE)), clock.advance(job)
            del w
        for name in plan.copied:
            poll()
            writer.submit(_copy, src, sink, name)
            yield None, clock.copied(name)
        writer.finish()


def read_weight(src: Source, job: LayerPlan) -> Tensor:
    """The layer's weight [N, K] on the CPU: as stored, or decoded with its own scales (float32)."""
    return job.stored.decode(src) if job.stored is not None else src.read(f"{job.layer}.weight")


def _quantize(job: LayerPlan, w: Tensor, sink: Sink, writer: "_Writer", device: torch.device,
              evidence: Evidence) -> LayerReport:
    began = time.monotonic()
    count = count_nonfinite(w)
    if count:
        raise InputFileError(f"{job.layer}.weight: {count} of {w.numel()} values are NaN or Inf. Such a layer draws noise. "
                             "Take a sound copy of the model, or keep the layer as it is with --allow-nonfinite.")
    result = quantize_layer(job.layer, w.to(device), job.recipe, evidence)
    writer.submit(_write, sink, job, result.tensors)
    return LayerReport(job.layer, job.shape, job.source, job.recipe.format.name, job.reason, job.bytes_in, job.bytes_out,
                       result.weight_error, time.monotonic() - began, result.notes)


def _write(sink: Sink, job: LayerPlan, tensors: Mapping[str, Tensor]) -> None:
    for suffix, tensor in tensors.items():
        sink.write(f"{job.layer}.{suffix}", tensor)
    sink.write(f"{job.layer}.comfy_quant", encode_config(job.config))


def _copy(src: Source, sink: Sink, name: str) -> None:
    offset = 0
    for chunk in src.copy_chunks(name):
        sink.write_chunk(name, offset, chunk)
        offset += len(chunk)


def _kept(layer: LayerPlan) -> LayerReport:
    return LayerReport(layer.layer, layer.shape, layer.source, None, layer.reason, layer.bytes_in, layer.bytes_out)


def count_nonfinite(w: Tensor) -> int:
    """How many values are NaN or Inf; one fast pass when none is."""
    if w.dtype.itemsize == 1:
        w = w.to(torch.float32)
    lowest, highest = torch.aminmax(w)
    if bool(torch.isfinite(lowest)) and bool(torch.isfinite(highest)):
        return 0
    return int((~torch.isfinite(w)).sum())


def nonfinite_layers(src: Source, plan: Plan) -> dict[str, str]:
    """{layer: reason} of the layers to be quantized that hold NaN or Inf. Reads every weight once."""
    found = {}
    for job in plan.quantized:
        poll()
        count = count_nonfinite(read_weight(src, job))
        if count:
            found[job.layer] = f"{count} values are NaN or Inf"
    return found


def pick_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one. RequestError for a device that this machine lacks."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as err:      # torch says so for an unknown device string
        raise RequestError(f"--device {device}: {err}. Choose auto, cpu, cuda or cuda:1.") from err
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: this torch sees no CUDA device. Use --device cpu, or install a CUDA build of torch.")
    return chosen


class _Writer:
    """One background thread with at most _UNWRITTEN_JOBS waiting jobs; the first failure is raised by the next call."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._pending: list[Future[Any]] = []

    def submit(self, function: Callable[..., None], *args: Any) -> None:
        while len(self._pending) >= _UNWRITTEN_JOBS:
            self._pending.pop(0).result()
        self._pending.append(self._pool.submit(function, *args))

    def finish(self) -> None:
        while self._pending:
            self._pending.pop(0).result()

    def abandon(self) -> None:
        """After an error: drop what has not begun, so that leaving does not wait for it."""
        for future in self._pending:
            future.cancel()


class _Clock:
    """Progress by bytes: a quantized byte and a copied byte count the same, which is close enough for an ETA."""

    def __init__(self, plan: Plan, src: Source, started: float) -> None:
        self._total = len(plan.quantized)
        self._sizes = {name: info.nbytes for name, info in src.tensors.items()}
        self._bytes = sum(job.bytes_in for job in plan.quantized) + sum(self._sizes[name] for name in plan.copied)
        self._started, self._done, self._done_bytes = started, 0, 0

    def state(self, name: str) -> Progress:
        elapsed = time.monotonic() - self._started
        left = self._bytes - self._done_bytes
        eta = elapsed * left / self._done_bytes if self._done_bytes else None
        return Progress(name, self._done, self._total, self._done_bytes, self._bytes, elapsed, eta)

    def advance(self, job: LayerPlan) -> Progress:
        self._done += 1
        self._done_bytes += job.bytes_in
        return self.state(job.layer)

    def copied(self, name: str) -> Progress:
        self._done_bytes += self._sizes[name]
        return self.state(name)
