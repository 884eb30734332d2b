"""One layer: weight + recipe + evidence -> the tensors on disk, their JSON, and how well they fit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..algorithms.asymmetric import Followed, InputPairs, follow
from ..algorithms.bias import can_correct, correct_bias
from ..algorithms.choosers.absmax import Absmax
from ..algorithms.evidence import Evidence
from ..algorithms.objective import Aim, Objective, make_objective, ratio
from ..algorithms.residual import Residual, make_residual
from ..algorithms.rounders.nearest import Nearest
from ..algorithms.task import Rounded, ScaleTask, Task, layer_generator
from ..cancel import poll
from ..formats.base import Format
from ..formats.slices import can_stream, errors_by_rows, quantize_streamed
from ..numerics.footprint import choose_device, following_bytes, free_bytes, needed_bytes
from ..numerics.precision import tensor_core_products
from ..policy.recipe import Recipe

NO_EVIDENCE = Evidence()
JUDGED_AT_ONCE = 1 << 21  # weights


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was used for a layer and how it ended, for the report.

    scales, rounding: the algorithms that ran, "auto" resolved; rounding is "nearest" after a fallback.
    objective: "output" (Hessian), "weighted" (its diagonal), "weight", or "projected" (learned rounding).
    error, nearest_error: relative, under that objective, of the result and of round-to-nearest with absmax scales.
    None where nothing was compared.
    fell_back: the algorithms ended above round-to-nearest, which was taken instead.
    inputs_left: what is left of the error that the layers before bring in (Followed.left); None where nobody knows.
    """

    scales: str = "absmax"
    rounding: str = "nearest"
    objective: str = "weight"
    error: float | None = None
    nearest_error: float | None = None
    fell_back: bool = False
    inputs_left: float | None = None


@dataclass(frozen=True, slots=True)
class LayerResult:
    """tensors: {suffix: tensor}, on the device where they were computed (footprint.py). config: the comfy_quant
    object.

    weight_error: relative Frobenius error of the re-decoded weight; None when it was not measured.
    notes: anything that differs from the recipe (a smaller rotation group, a fallback), in words. judgement: what was
    used. bias: the corrected one, None where it stays. residual: the low-rank part, None where the recipe wants none.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    weight_error: float | None
    notes: tuple[str, ...] = ()
    judgement: Judgement = field(default_factory=Judgement)
    bias: Tensor | None = None
    residual: Residual | None = None


def quantize_layer(
    layer: str,
    w: Tensor,
    recipe: Recipe,
    evidence: Evidence = NO_EVIDENCE,
    measure: bool = True,
    bias: Tensor | None = None,
    pairs: InputPairs | None = None,
) -> LayerResult:
    """w: [N, K] of a float dtype, finite, on the compute device. The maths is float32. Cancellable (cancel_scope).

    bias: [N], to be corrected; it stays where a low-rank part is asked for. pairs: what the layers quantized before
    this one do to its inputs; it is rounded to make up for that (asymmetric.py).
    """
    if recipe.residual.wants(layer):
        bias = None  # the low-rank part takes the mean error too: corrected twice it would come back
    followed = None if pairs is None else _follow(w, pairs)
    job = _Job(layer, w, recipe.resolve(evidence), evidence, measure, bias, followed)
    if bias is None or not can_correct(evidence):
        return _quantize(job)
    # A corrected bias takes the mean error, so the weight is rounded for what remains of the inputs.
    result = _quantize(replace(job, evidence=evidence.centred()))
    return result if result.bias is not None else _quantize(job)


@dataclass(frozen=True, slots=True)
class _Job:
    """What quantize_layer was asked for. recipe: with "auto" resolved.

    followed: the weight to round towards instead of w, in order of execution; None elsewhere.
    """

    layer: str
    w: Tensor
    recipe: Recipe
    evidence: Evidence
    measure: bool
    bias: Tensor | None
    followed: Followed | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.w.shape[0], self.w.shape[1]

    @property
    def wants_residual(self) -> bool:
        return self.recipe.residual.wants(self.layer)


def _follow(w: Tensor, pairs: InputPairs) -> Followed:
    needed = following_bytes((w.shape[0], w.shape[1]))
    device, elsewhere = choose_device(w.device, free_bytes(w.device), needed)
    found = follow(w.to(device, torch.float32), pairs, poll)
    if elsewhere is None:
        return found
    return replace(found, notes=(f"what makes up for the layers before was {elsewhere}",))


def _quantize(job: _Job) -> LayerResult:
    recipe, shape = job.recipe, job.shape
    fmt = recipe.format.for_shape(shape)
    config = fmt.config(shape, job.w.dtype)
    notes: tuple[str, ...] = ()
    if fmt != recipe.format:
        notes = (f"rotation group {fmt.rotation}: {recipe.format.rotation} does not divide {shape[1]}",)
    nothing_more = job.bias is None and not job.wants_residual and job.followed is None
    if recipe.plain and nothing_more and can_stream(fmt, job.w):
        tensors, error = quantize_streamed(fmt, job.w, job.measure)
        return LayerResult(tensors, config, error, notes)
    device, placed = _place(job)
    own = fmt.prepare(job.w.to(device, torch.float32))
    generator = layer_generator(recipe.seed, job.layer)
    task = Task(fmt, _target(job, fmt, own), make_objective(fmt, job.evidence, device), generator)
    rounded, judgement = _solve(job, task, own)
    # Rotation is orthogonal and padding exact, so the error in the work basis is the weight's own.
    error = fmt.decoding_error(own, rounded.codes, rounded.qp) if job.measure else None
    bias, residual, more = _extras(job, task, rounded)
    notes += (() if job.followed is None else job.followed.notes) + placed + rounded.notes + more
    return LayerResult(fmt.pack(rounded.codes, rounded.qp, shape), config, error, notes, judgement, bias, residual)


def _place(job: _Job) -> tuple[torch.device, tuple[str, ...]]:
    """Where it is computed, and a note where that is not the weight's own device."""
    needed = needed_bytes(job.shape, job.recipe.rounding.weight_copies, job.evidence.hessian is not None)
    device, elsewhere = choose_device(job.w.device, free_bytes(job.w.device), needed)
    return device, () if elsewhere is None else (elsewhere,)


def _target(job: _Job, fmt: Format, own: Tensor) -> Tensor:
    """The work weight to round towards: the layer's own, or the one that makes up for the layers before it.

    own: float32 [Np, Kp], the layer's weight in the work basis.
    """
    followed = job.followed
    if followed is None or followed.ridge is None:
        return own
    return fmt.prepare(followed.weight.to(own.device))


def _solve(job: _Job, task: Task, own: Tensor) -> tuple[Rounded, Judgement]:
    """Scales and codes, and how they compare with round-to-nearest."""
    scales, rounding = job.recipe.scales, job.recipe.rounding
    begun = rounding.begin(task)
    rounded = begun.finish(scales.choose(ScaleTask(task.fmt, task.work, begun.weights)))
    left = None if job.followed is None else job.followed.left
    judgement = Judgement(scales.name, rounding.name, begun.judge.name, inputs_left=left)
    if job.recipe.plain or rounding.unbiased:
        return rounded, judgement
    return _judge(task, own, begun.judge, rounded, judgement)


def _judge(task: Task, own: Tensor, judge: Aim, rounded: Rounded, judgement: Judgement) -> tuple[Rounded, Judgement]:
    """`rounded`, or round-to-nearest with absmax scales where that is better, as the rounder judges.

    own: the layer's own work weight, which is what round-to-nearest rounds. Both errors are against task.work. In
    order of execution that is another weight: the one that makes up for the layers before this one.
    """
    fmt, work, qp = task.fmt, task.work, task.fmt.absmax(own)
    with tensor_core_products(work.device):
        reference = judge.total_loss(work.split(max(1, JUDGED_AT_ONCE // work.shape[1])))
        error = ratio(judge.total_loss(errors_by_rows(fmt, work, rounded.codes, rounded.qp)), reference)
        nearest = ratio(judge.total_loss(errors_by_rows(fmt, work, None, qp, own)), reference)
    judgement = replace(judgement, error=error, nearest_error=nearest)
    if error <= nearest:
        return rounded, judgement
    note = (
        f"{judgement.rounding} with {judgement.scales} scales ended at {error:.4g} ({judgement.objective} error), "
        f"above {nearest:.4g} of round-to-nearest, which was taken instead"
    )
    return (
        Rounded(task.encode(own, qp), qp, (*rounded.notes, note)),
        replace(judgement, scales=Absmax.name, rounding=Nearest.name, error=nearest, fell_back=True),
    )


def _extras(job: _Job, task: Task, rounded: Rounded) -> tuple[Tensor | None, Residual | None, tuple[str, ...]]:
    """The corrected bias, the low-rank part, and notes; from what a reader decodes, in the layer's own basis."""
    if job.bias is None and not job.wants_residual:
        return None, None, ()
    fmt, evidence = task.fmt, job.evidence
    error = fmt.restore(task.work - fmt.decode(rounded.codes, rounded.qp), job.shape)
    residual = None
    if job.wants_residual:
        hessian = None if evidence.hessian is None else evidence.hessian.to(error.device, torch.float32)
        objective = Objective(hessian, rows=evidence.count)
        residual = make_residual(fmt.restore(task.work, job.shape), error, job.recipe.residual.rank, objective)
    if job.bias is None:
        return None, residual, ()
    corrected, note = correct_bias(job.bias, error, evidence)
    return corrected, residual, () if note is None else (note,)
