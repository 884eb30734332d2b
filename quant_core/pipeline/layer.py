"""One layer: weight + recipe + evidence -> the tensors on disk, their JSON, and how well they fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..algorithms.asymmetric import Followed, InputPairs, follow
from ..algorithms.bias import can_correct, correct_bias
from ..algorithms.choosers import CHOOSERS
from ..algorithms.evidence import Evidence
from ..algorithms.objective import Objective, make_objective, ratio
from ..algorithms.options import read_options
from ..algorithms.residual import Residual, ResidualOptions, make_residual
from ..algorithms.rounders import ROUNDERS
from ..algorithms.task import Rounded, Task, layer_generator
from ..cancel import cancel_scope, poll
from ..formats.streamed import can_slice, quantize_rows
from ..formats.tiles import encode_rows, errors_by_rows
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
    error, nearest_error: relative, under that objective, of the result and of round-to-nearest with absmax scales; None where nothing was compared.
    fell_back: the algorithms ended above round-to-nearest, which was taken instead.
    inputs_left: what is left of the error that the layers before bring in (Followed.left); None where that is not known.
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
    """tensors: {suffix: tensor} on the device where it was computed (see footprint.py). config: the comfy_quant object.

    weight_error: relative Frobenius error of the re-decoded weight; None when it was not measured.
    notes: anything that differs from the recipe (a smaller rotation group, a fallback), in words. judgement: what was
    used. bias: the corrected one, None where it stays. residual: the low-rank part, None unless the options ask for it.
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
    cancel: Callable[[], bool] | None = None,
    pairs: InputPairs | None = None,
) -> LayerResult:
    """w: [N, K] of a float dtype, finite, on the compute device. The maths is float32. bias: [N], to be corrected; it stays where a
    low-rank part is asked for.

    cancel: asked several times a second; Cancelled is raised when it says True. None: an enclosing cancel_scope counts.
    pairs: what the layers quantized before this one do to its inputs; it is rounded to make up for that (asymmetric.py).
    """
    if read_options(ResidualOptions, recipe.options).wants(layer):
        bias = None  # the low-rank part takes the mean error too: corrected twice it would come back
    with cancel_scope(cancel):
        aim = None if pairs is None else _follow(w, pairs)
        if bias is None or not can_correct(evidence):
            return _quantize(layer, w, recipe, evidence, measure, bias, aim)
        # A corrected bias takes the mean error, so the weight is rounded for what remains of the inputs.
        result = _quantize(layer, w, recipe, evidence.centred(), measure, bias, aim)
        return result if result.bias is not None else _quantize(layer, w, recipe, evidence, measure, bias, aim)


def _follow(w: Tensor, pairs: InputPairs) -> Followed:
    device, elsewhere = choose_device(w.device, free_bytes(w.device), following_bytes(tuple(w.shape)))
    found = follow(w.to(device, torch.float32), pairs, poll)
    return (
        found if elsewhere is None else replace(found, notes=(f"what makes up for the layers before was {elsewhere}",))
    )


def _quantize(
    layer: str, w: Tensor, recipe: Recipe, evidence: Evidence, measure: bool, bias: Tensor | None, aim: Followed | None
) -> LayerResult:
    """aim: rounded towards its weight instead of w; every error is still w's own, but for the output's."""
    shape, source_dtype = tuple(w.shape), w.dtype
    fmt = recipe.format.for_shape(shape)
    notes = (
        ()
        if fmt == recipe.format
        else (f"rotation group {fmt.rotation}: {recipe.format.rotation} does not divide {shape[1]}",)
    )
    scales, rounding = recipe.resolve(evidence)
    wants_more = bias is not None or read_options(ResidualOptions, recipe.options).wants(layer)
    if (scales, rounding) == ("absmax", "nearest") and not wants_more and aim is None and can_slice(fmt, w):
        tensors, error = quantize_rows(fmt, w, measure)
        return LayerResult(tensors, fmt.config(shape, source_dtype), error, notes)
    needed = needed_bytes(shape, rounding, evidence.hessian is not None)
    device, elsewhere = choose_device(w.device, free_bytes(w.device), needed)
    notes += (() if aim is None else aim.notes) + (() if elsewhere is None else (elsewhere,))
    moved = aim is not None and aim.ridge is not None
    plain = fmt.prepare(w.to(device, torch.float32))
    work = fmt.prepare(aim.weight.to(device)) if moved else plain
    objective = make_objective(fmt, evidence, device)
    rounder = ROUNDERS[rounding]
    task = rounder.prepare(
        Task(
            layer,
            fmt,
            work,
            objective,
            recipe.options,
            layer_generator(recipe.seed, layer, "cpu"),
            weights=objective.diagonal,
            plain=plain if moved else None,
        )
    )
    rounded = rounder.round_codes(task, CHOOSERS[scales](task))
    judgement = Judgement(scales, rounding, task.judge.name, inputs_left=None if aim is None else aim.left)
    if (scales, rounding) != ("absmax", "nearest") and not rounder.unbiased:
        rounded, judgement = judge(task, rounded, judgement)
    # Rotation is orthogonal and padding exact, so the error in the work basis is the weight's own.
    error = fmt.decoding_error(plain, rounded.codes, rounded.qp) if measure else None
    new_bias, residual, more = _extras(task, shape, rounded, recipe, evidence, bias)
    return LayerResult(
        fmt.pack(rounded.codes, rounded.qp, shape),
        fmt.config(shape, source_dtype),
        error,
        notes + rounded.notes + more,
        judgement,
        new_bias,
        residual,
    )


def _extras(
    task: Task, shape: tuple[int, int], rounded: Rounded, recipe: Recipe, evidence: Evidence, bias: Tensor | None
) -> tuple[Tensor | None, Residual | None, tuple[str, ...]]:
    """The corrected bias, the low-rank part, and notes; from what a reader decodes, in the layer's own basis."""
    options = read_options(ResidualOptions, recipe.options)
    wanted = options.wants(task.layer)
    if bias is None and not wanted:
        return None, None, ()
    error = task.fmt.restore(task.work - task.fmt.decode(rounded.codes, rounded.qp), shape)
    residual = None
    if wanted:
        hessian = None if evidence.hessian is None else evidence.hessian.to(error.device, torch.float32)
        residual = make_residual(
            task.fmt.restore(task.work, shape), error, options.residual_rank, Objective(hessian, rows=evidence.count)
        )
    if bias is None:
        return None, residual, ()
    corrected, note = correct_bias(bias, error, evidence)
    return corrected, residual, () if note is None else (note,)


def judge(task: Task, rounded: Rounded, judgement: Judgement) -> tuple[Rounded, Judgement]:
    """`rounded`, or round-to-nearest with absmax scales where that is better under the objective of the algorithms."""
    fmt, work, aim = task.fmt, task.work, task.judge
    plain = work if task.plain is None else task.plain
    qp = fmt.absmax(plain)
    with tensor_core_products(work.device):
        reference = aim.total_loss(work.split(max(1, JUDGED_AT_ONCE // work.shape[1])))
        error = ratio(aim.total_loss(errors_by_rows(fmt, work, rounded.codes, rounded.qp)), reference)
        nearest = ratio(aim.total_loss(errors_by_rows(fmt, work, None, qp, plain)), reference)
    judgement = replace(judgement, error=error, nearest_error=nearest)
    if error <= nearest:
        return rounded, judgement
    note = (
        f"{judgement.rounding} with {judgement.scales} scales ended at {error:.4g} ({judgement.objective} error), above "
        f"{nearest:.4g} of round-to-nearest, which was taken instead"
    )
    return (
        Rounded(encode_rows(fmt, plain, qp), qp, rounded.notes + (note,)),
        replace(judgement, scales="absmax", rounding="nearest", error=nearest, fell_back=True),
    )
