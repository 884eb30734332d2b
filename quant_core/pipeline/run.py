"""The pipeline: one layer in memory at a time, reading ahead and writing behind while torch computes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..algorithms.asymmetric import InputPairs
from ..algorithms.residual import Residual, save_residuals
from ..calibration.use import CalibrationUse, LayerInputs, OpenCalibration, on_device, open_use
from ..cancel import cancel_scope, poll
from ..checkpoint.metadata import encode_config
from ..checkpoint.sink import Sink, open_sink
from ..checkpoint.source import Source, open_source
from ..errors import InputFileError, OutputError, RequestError
from ..policy.general import Policy
from ..policy.recipe import Recipe
from ..progress import Clock, Progress
from ..stored.layers import config_tensor_name
from .in_order.jobs import InOrder, LiveModel, in_order
from .layer import NO_EVIDENCE, LayerResult, quantize_layer
from .plan import LayerPlan, Plan, make_plan
from .report import LayerReport, RunReport
from .verify import check_file
from .write_behind import Writer

_DEVICE = re.compile(r"cpu|(?P<cuda>cuda)(:(?P<index>\d+))?")


def convert(
    source: str | Path,
    target: str | Path,
    recipe: Recipe,
    policy: Policy = Policy(),
    *,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    never_pack: frozenset[str] = frozenset(),
    calibration: CalibrationUse | None = None,
    residual_lora: str | Path | None = None,
    live: LiveModel | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> RunReport:
    """The whole way from file to verified file. Raises QuantPressError; on any error no target appears.

    allow_nonfinite: a layer with NaN or Inf keeps its source dtype; by default it is an InputFileError.
    calibration: what is known of the layers' inputs. residual_lora: where the low-rank part goes that the recipe's
    residual_rank asks for; written when the model is complete. live: the running model that the calibration was captured from,
    to quantize in order of execution (in_order.py).
    progress: called after every tensor. cancel: asked often; true raises Cancelled within a second.
    """
    started = time.monotonic()
    where = pick_device(device)
    lora = _residual_target(residual_lora, Path(target), recipe, policy, overwrite)
    if live is not None and calibration is None:
        raise RequestError(
            "quantizing in order needs the calibration that was captured from the model. Give both, or neither."
        )
    with ExitStack() as stack:
        stack.enter_context(cancel_scope(cancel))
        src = stack.enter_context(open_source(source))
        known = (
            stack.enter_context(open_use(replace(calibration, in_order=live is not None)))
            if calibration is not None
            else None
        )
        plan = make_plan(src, recipe, policy, never_pack=never_pack, calibration=known)
        warnings = plan.warnings
        if allow_nonfinite:
            bad = nonfinite_layers(src, plan)
            if bad:
                plan = make_plan(src, recipe, policy, never_pack=never_pack, keep_layers=bad, calibration=known)
                warnings = plan.warnings + tuple(f"{layer}: kept: {why}" for layer, why in bad.items())
        residuals: dict[str, Residual] = {}
        with open_sink(target, plan.outputs, plan.metadata, overwrite=overwrite, sources=src.files) as sink:
            reports = []
            for report, state in run(
                plan, src, sink, device=where, calibration=known, residuals=residuals, started=started, live=live
            ):
                if report is not None:
                    reports.append(report)
                if progress is not None:
                    progress(state)
            src.check_unchanged()
            sink.commit(verify=lambda part: check_file(part).raise_for_errors())
        if lora is not None:
            save_residuals(lora, residuals, {"format": "pt"})
        warnings += known.warnings() if known is not None else ()
    return RunReport(
        str(source),
        str(target),
        recipe.describe(),
        tuple(reports),
        warnings,
        plan.source_bytes,
        plan.output_bytes,
        plan.peak_bytes,
        time.monotonic() - started,
        str(where),
    )


def _residual_target(
    path: str | Path | None, target: Path, recipe: Recipe, policy: Policy, overwrite: bool
) -> Path | None:
    """The checked path of the low-rank part; None when the recipe asks for none. RequestError, OutputError."""
    recipes = (recipe, policy.fallback, *(rule.recipe for rule in policy.rules))
    wanted = any(one.residual.rank for one in recipes if one is not None)
    if path is None and not wanted:
        return None
    if path is None or not wanted:
        raise RequestError(
            "a low-rank part needs both a rank and a file to go to: give --residual-lora FILE and --residual-rank N "
            "(residual_rank)."
        )
    path = Path(path)
    if path.suffix != ".safetensors" or path.resolve() == target.resolve() or not path.parent.is_dir():
        raise OutputError(f"{path}: the low-rank part needs a .safetensors name of its own, in a folder that exists.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: the file exists. Choose another name, or allow overwriting.")
    return path


@dataclass(frozen=True, slots=True)
class _Read:
    """A job's data, all on the CPU but for the pairs. bias: [N], only when it is to be corrected."""

    w: Tensor
    bias: Tensor | None = None
    inputs: LayerInputs = field(default_factory=lambda: LayerInputs(NO_EVIDENCE))
    pairs: InputPairs | None = None


def run(
    plan: Plan,
    src: Source,
    sink: Sink,
    *,
    device: torch.device,
    calibration: OpenCalibration | None,
    residuals: dict[str, Residual],
    started: float,
    live: LiveModel | None = None,
) -> Iterator[tuple[LayerReport | None, Progress]]:
    """Yields after each layer (its report) and after each copied tensor (None); the caller may stop at any point.

    residuals: {layer: low-rank part} is filled in, on the CPU.
    """
    sizes = {name: src.tensors[name].nbytes for name in plan.copied}
    nbytes = sum(job.bytes_in for job in plan.quantized) + sum(sizes.values())
    clock = Clock(len(plan.quantized), nbytes, started=started)
    with ExitStack() as stack:
        reader = stack.enter_context(ThreadPoolExecutor(1, "quantpress-read"))
        writer = Writer(stack.enter_context(ThreadPoolExecutor(1, "quantpress-write")))
        stack.callback(writer.abandon)
        for layer in plan.layers:
            if layer.recipe is None:
                yield _kept(layer), clock.state(layer.layer)
        order = None if live is None else stack.enter_context(in_order(plan.quantized, calibration.known_as, live))
        for job, data in (
            _read_ahead(plan.quantized, reader, src, calibration)
            if order is None
            else _read_on_arrival(order, src, calibration)
        ):
            poll()
            result, report = _quantize(job, data, device)
            if data.pairs is not None:
                order.deliver(job.layer, _decoded(job, result), _biased(job, data, result, src))
            _hand_over(job, data, result, sink, writer, residuals)
            yield report, clock.advance(job.layer, job.bytes_in)
            del data, result
        for name in plan.copied:
            poll()
            writer.submit(sink.copy, src, name)
            yield None, clock.advance(name, sizes[name], layers=0)
        writer.finish()


def read_weight(src: Source, job: LayerPlan) -> Tensor:
    """The layer's weight [N, K] on the CPU: as stored, or decoded with its own scales (float32)."""
    return job.stored.decode(src) if job.stored is not None else src.read(f"{job.layer}.weight")


def _read_ahead(
    jobs: Sequence[LayerPlan], reader: ThreadPoolExecutor, src: Source, calibration: OpenCalibration | None
) -> Iterator[tuple[LayerPlan, _Read]]:
    ahead: Future[_Read] | None = reader.submit(_read, src, jobs[0], calibration) if jobs else None
    for index, job in enumerate(jobs):
        data = ahead.result()
        ahead = reader.submit(_read, src, jobs[index + 1], calibration) if index + 1 < len(jobs) else None
        yield job, data


def _read_on_arrival(order: InOrder, src: Source, calibration: OpenCalibration) -> Iterator[tuple[LayerPlan, _Read]]:
    for ordered in order:
        yield ordered.job, replace(_read(src, ordered.job, calibration), pairs=ordered.pairs)


def _read(src: Source, job: LayerPlan, calibration: OpenCalibration | None) -> _Read:
    w = read_weight(src, job)
    if calibration is None:
        return _Read(w)
    recipe = job.recipe
    hessian = not recipe.plain or recipe.residual.wants(job.layer)
    return _Read(
        w,
        None if job.bias is None else src.read(job.bias),
        calibration.read(job.layer, recipe.format, job.config, hessian),
    )


def _quantize(job: LayerPlan, data: _Read, device: torch.device) -> tuple[LayerResult, LayerReport]:
    began = time.monotonic()
    count = count_nonfinite(data.w)
    if count:
        raise InputFileError(
            f"{job.layer}.weight: {count} of {data.w.numel()} values are NaN or Inf. Such a layer draws noise. "
            "Take a sound copy of the model, or keep the layer as it is: name it in keep, or give "
            "--allow-nonfinite on the command line."
        )
    bias = None if data.bias is None else data.bias.to(device)
    result = quantize_layer(
        job.layer, data.w.to(device), job.recipe, on_device(data.inputs.evidence, device), bias=bias, pairs=data.pairs
    )
    return result, LayerReport(
        job.layer,
        job.shape,
        job.source,
        job.recipe.format.name,
        job.reason,
        job.bytes_in,
        job.bytes_out,
        result.weight_error,
        time.monotonic() - began,
        result.notes,
        result.judgement,
        data.inputs.evidence.count,
        None if job.bias is None else result.bias is not None,
        None if data.inputs.input_scale is None else float(data.inputs.input_scale),
        None if result.residual is None else result.residual.corrected_error,
    )


def _hand_over(
    job: LayerPlan, data: _Read, result: LayerResult, sink: Sink, writer: Writer, residuals: dict[str, Residual]
) -> None:
    tensors = {f"{job.layer}.{suffix}": tensor for suffix, tensor in result.tensors.items()}
    tensors[config_tensor_name(job.layer)] = encode_config(job.config)
    if data.inputs.input_scale is not None:
        tensors[f"{job.layer}.input_scale"] = data.inputs.input_scale
    if job.bias is not None:
        tensors[job.bias] = data.bias if result.bias is None else result.bias
    writer.submit(_write, sink, tensors)
    if result.residual is not None:
        part = result.residual
        residuals[job.layer] = replace(part, up=part.up.cpu(), down=part.down.cpu())


def _decoded(job: LayerPlan, result: LayerResult) -> Tensor:
    """float32 [N, K]: what a reader makes of the result, with the low-rank part that is loaded beside it."""
    weight, residual = job.recipe.format.dequantize(result.tensors, job.shape), result.residual
    return weight if residual is None else weight + (residual.up.float() @ residual.down.float()).to(weight.device)


def _biased(job: LayerPlan, data: _Read, result: LayerResult, src: Source) -> Tensor | None:
    """The bias [N] beside the result; None where the layer has none."""
    if result.bias is not None or data.bias is not None:
        return data.bias if result.bias is None else result.bias
    name = f"{job.layer}.bias"
    return src.read(name) if name in src.tensors else None


def _write(sink: Sink, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        sink.write(name, tensor)


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
    found = _DEVICE.fullmatch(str(device))
    if found is None:
        raise RequestError(f"--device {device}: there is no such device. Choose auto, cpu, cuda or cuda:1.")
    if found["cuda"] and not torch.cuda.is_available():
        raise RequestError(
            "--device cuda: this torch sees no CUDA device. Use --device cpu, or install a CUDA build of torch."
        )
    if found["index"] and int(found["index"]) >= torch.cuda.device_count():
        raise RequestError(
            f"--device {device}: this torch sees {torch.cuda.device_count()} CUDA devices, numbered from 0."
        )
    return torch.device(device)
