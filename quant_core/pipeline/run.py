"""The pipeline: one layer in memory at a time, reading ahead and writing behind while torch computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..algorithms.residual import Residual, save_residuals
from ..calibration.use import on_device, open_use
from ..cancel import cancel_scope, poll
from ..checkpoint.metadata import encode_config
from ..checkpoint.sink import Sink, open_sink
from ..checkpoint.source import Source, open_source
from ..errors import InputFileError, Problem, Remedy, RequestError
from ..progress import Clock, Progress
from ..stored.layers import config_tensor_name
from .feed import Feed, JobData, count_nonfinite, nonfinite_reason, open_feed
from .in_order.jobs import LiveModel
from .kept_layers import written_tensors
from .layer import LayerResult, quantize_layer
from .layer_plan import Kept, Quantized, Rewritten
from .plan import Plan, make_plan
from .report import LayerReport, RunReport
from .request import Request, pick_device
from .verify import check_file

_UNWRITTEN_JOBS = 2  # jobs whose tensors wait for the disk


def convert(
    request: Request,
    *,
    live: LiveModel | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> RunReport:
    """The whole way from file to verified file. Raises QuantPressError; on any error no target appears.

    live: the running model that the calibration was captured from, for a request in order of execution.
    progress: called after every tensor. cancel: asked often; true raises Cancelled within a second.
    The low-rank part is written when the model is complete.
    """
    started = time.monotonic()
    device = pick_device(request.device)
    if request.in_order != (live is not None):
        raise RequestError(
            "quantizing in order needs the running model, and nothing else does. Give both, or neither."
        )
    reports: list[LayerReport] = []
    residuals: dict[str, Residual] = {}
    with ExitStack() as stack:
        stack.enter_context(cancel_scope(cancel))
        src = stack.enter_context(open_source(request.source))
        reads = [src.path, *src.files, *([] if request.calibration is None else [request.calibration.path])]
        request.check_residual_file(reads)
        known = None if request.calibration is None else stack.enter_context(open_use(request.calibration))
        plan = make_plan(src, request, known, partial(nonfinite_reason, src) if request.allow_nonfinite else None)
        with open_sink(
            request.target, plan.outputs, plan.metadata, overwrite=request.overwrite, sources=reads
        ) as sink:
            with open_feed(plan, src, known, live) as feed:
                for step in run(plan, src, sink, feed, device, Clock(*_work(plan, src), started=started)):
                    if step.report is not None:
                        reports.append(step.report)
                    if step.residual is not None:
                        residuals[step.progress.layer] = step.residual
                    if progress is not None:
                        progress(step.progress)
            src.check_unchanged()
            sink.commit(verify=lambda part: check_file(part).raise_for_errors())
        if request.residual_lora is not None:
            save_residuals(request.residual_lora, residuals, {"format": "pt"})
        warnings = (*map(Problem, plan.warnings), *(known.warnings() if known is not None else ()))
    return _report(request, plan, reports, warnings, str(device), time.monotonic() - started)


def _work(plan: Plan, src: Source) -> tuple[int, int]:
    """How many layers there are to do, and how many bytes of the source."""
    copied = sum(src.tensors[name].nbytes for name in plan.copied)
    return len(plan.quantized), sum(job.bytes_in for job in (*plan.quantized, *plan.rewritten)) + copied


def _report(
    request: Request,
    plan: Plan,
    reports: list[LayerReport],
    warnings: tuple[Problem, ...],
    device: str,
    seconds: float,
) -> RunReport:
    return RunReport(
        source=str(request.source),
        target=str(request.target),
        recipe=request.recipe.describe(),
        layers=tuple(reports),
        warnings=warnings,
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        peak_bytes=plan.peak_bytes,
        seconds=seconds,
        device=device,
    )


@dataclass(frozen=True, slots=True)
class Step:
    """A layer or a copied tensor is done. report: the layer's; None after a copied tensor. residual: on the CPU."""

    progress: Progress
    report: LayerReport | None = None
    residual: Residual | None = None


def run(plan: Plan, src: Source, sink: Sink, feed: Feed, device: torch.device, clock: Clock) -> Iterator[Step]:
    """Yields after each layer and after each copied tensor; the caller may stop at any point."""
    with ExitStack() as stack:
        writer = Writer(stack.enter_context(ThreadPoolExecutor(1, "quantpress-write")))
        stack.callback(writer.abandon)
        for layer in plan.kept:
            if isinstance(layer, Rewritten):
                poll()
                writer.submit(_write, sink, written_tensors(layer, src))
                yield Step(clock.advance(layer.layer, layer.bytes_in, layers=0), _kept(layer))
            else:
                yield Step(clock.state(layer.layer), _kept(layer))
        for job, data in feed:
            poll()
            began = time.monotonic()
            result = _quantize(job, data, device)
            report = _quantized(job, data, result, time.monotonic() - began)
            feed.deliver(job, data, result)
            writer.submit(_write, sink, _tensors(job, data, result))
            yield Step(clock.advance(job.layer, job.bytes_in), report, _on_cpu(result.residual))
            del data, result
        for name in plan.copied:
            poll()
            writer.submit(sink.copy, src, name)
            yield Step(clock.advance(name, src.tensors[name].nbytes, layers=0))
        writer.finish()


def _quantize(job: Quantized, data: JobData, device: torch.device) -> LayerResult:
    count = count_nonfinite(data.w)
    if count:
        raise InputFileError(
            f"{job.layer}.weight: {count} of {data.w.numel()} values are NaN or Inf. Such a layer draws noise. "
            "Take a sound copy of the model.",
            "allow_nonfinite",
            Remedy.KEEP,
        )
    return quantize_layer(
        job.layer,
        data.w.to(device),
        job.recipe,
        on_device(data.inputs.evidence, device),
        bias=None if data.bias is None else data.bias.to(device),
        pairs=data.pairs,
    )


def _kept(layer: Kept) -> LayerReport:
    return LayerReport(layer.layer, layer.shape, layer.source, None, layer.reason, layer.bytes_in, layer.bytes_out)


def _quantized(job: Quantized, data: JobData, result: LayerResult, seconds: float) -> LayerReport:
    return LayerReport(
        layer=job.layer,
        shape=job.shape,
        source=job.source,
        format=job.recipe.format.name,
        reason=job.reason,
        bytes_in=job.bytes_in,
        bytes_out=job.bytes_out,
        weight_error=result.weight_error,
        seconds=seconds,
        notes=result.notes,
        judgement=result.judgement,
        rows=data.inputs.evidence.count,
        bias_corrected=None if job.bias is None else result.bias is not None,
        input_scale=None if data.inputs.input_scale is None else float(data.inputs.input_scale),
        residual_error=None if result.residual is None else result.residual.corrected_error,
    )


def _tensors(job: Quantized, data: JobData, result: LayerResult) -> dict[str, Tensor]:
    """What is written for a layer, by name."""
    tensors = {f"{job.layer}.{suffix}": tensor for suffix, tensor in result.tensors.items()}
    tensors[config_tensor_name(job.layer)] = encode_config(job.config)
    if data.inputs.input_scale is not None:
        tensors[f"{job.layer}.input_scale"] = data.inputs.input_scale
    bias = data.bias if result.bias is None else result.bias
    if job.bias is not None and bias is not None:
        tensors[job.bias] = bias
    return tensors


def _on_cpu(part: Residual | None) -> Residual | None:
    return None if part is None else replace(part, up=part.up.cpu(), down=part.down.cpu())


def _write(sink: Sink, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        sink.write(name, tensor)


class Writer:
    """Writes while the next layer is computed: in one background thread, for which at most _UNWRITTEN_JOBS jobs wait.

    The first failure is raised by the next call.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._pending: list[Future[None]] = []

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
