"""The plan: what happens to every tensor, decided from headers alone.

It is the dry run, and the preview of the size and of the memory needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._version import __version__
from ..calibration.use import OpenCalibration
from ..checkpoint.header import OutputTensor, tensor_bytes
from ..checkpoint.metadata import HEADER_KEY, build_header_metadata
from ..checkpoint.source import Source
from ..errors import InputFileError, PlanError, Problem, Remedy, counted, some_of
from ..names.diffusers import diffusers_warning
from ..policy.general import Policy
from ..policy.recipe import Recipe
from ..stored.foreign import refusal
from ..stored.layers import StoredLayer, stored_layers
from ..stored.leftovers import Leftovers, leftovers
from .kept_layers import in_one_form, rewriting_notes
from .layer_plan import Kept, LayerPlanner, Quantized, Rewritten, linear_layers, weight_shape
from .model_rules import rules_of
from .request import Request

RECIPE_KEY = "quantpress"
# Torch, Python and the libraries, before any weight is read; measured on Linux.
_BASE_BYTES = 350_000_000
# Float32 copies of one weight that exist at once: the weight, its prepared form, and slices of temporaries.
_WORK_COPIES = 3
# Rounding to nearest works through a few rows at a time (formats/slices.py).
_SLICE_BYTES = 32_000_000
_READ_AHEAD_AND_UNWRITTEN = 3
# Float32 copies of a Hessian: as read, the triangle on disk, damped, and factored.
_HESSIAN_COPIES = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """layers: the linear layers in file order. copied: names of all other tensors, copied byte for byte.

    outputs: every tensor of the new file in order. metadata: its header. warnings: sentences for the report.
    """

    layers: tuple[Kept | Quantized, ...]
    copied: tuple[str, ...]
    outputs: tuple[OutputTensor, ...]
    metadata: Mapping[str, str]
    warnings: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    peak_bytes: int

    @property
    def quantized(self) -> tuple[Quantized, ...]:
        return _quantized(self.layers)

    @property
    def kept(self) -> tuple[Kept, ...]:
        return _kept(self.layers)

    @property
    def rewritten(self) -> tuple[Rewritten, ...]:
        return tuple(layer for layer in self.layers if isinstance(layer, Rewritten))


def make_plan(
    src: Source,
    request: Request,
    calibration: OpenCalibration | None = None,
    keep: Callable[[Quantized], str | None] | None = None,
) -> Plan:
    """Decide everything before a weight is read.

    calibration: refused here when it is of another model. keep: asked of each layer that would be quantized; a reason
    keeps it, and becomes a warning. Raises PlanError with all problems, RequestError, InputFileError (another
    quantizer's file).
    """
    stored = stored_layers(src)
    foreign = refusal(src)
    if foreign is not None:
        raise InputFileError(foreign)
    model = rules_of(src, {layer: entry.shape for layer, entry in stored.items()}, request.never_pack)
    problem = model.problem()
    if problem is not None and not request.other_runtime:
        raise PlanError([replace(problem, text=f"{src.path}: {problem.text}")])
    names = linear_layers(src, stored)
    policy = request.policy_for(names)
    policy.check(names)
    warnings: tuple[str, ...] = ()
    if calibration is not None:
        warnings = calibration.require_match(src, {name: weight_shape(src, name, stored) for name in names})
    planner = LayerPlanner(src, stored, request.recipe, policy, model, calibration)
    layers, remarks = _keeping(tuple(planner.plan(name) for name in names), keep)
    quantized = _quantized(layers)
    if not quantized:
        raise PlanError([_nothing_to_do(src, _kept(layers), request.recipe)])
    left = _leftovers(src, stored)
    layers = in_one_form(src, layers, model)
    copied, outputs = _file_contents(src, layers, left.names)
    nbytes = sum(tensor_bytes(o.dtype, o.shape) for o in outputs)
    return Plan(
        layers,
        copied,
        outputs,
        _metadata(src, request, policy, layers, calibration),
        warnings
        + model.warnings(request.other_runtime)
        + _warnings(src, layers, left, calibration)
        + _larger(src.nbytes, nbytes)
        + remarks,
        src.nbytes,
        nbytes,
        _peak_bytes(layers, calibration),
    )


def for_other_runtime(src: Source) -> bool:
    """Whether the file's record says that it was quantized for another runtime than ComfyUI."""
    try:
        record = json.loads(src.metadata.get(RECIPE_KEY, "{}"))
    except ValueError:
        return False
    return isinstance(record, dict) and record.get("other_runtime") is True


def _quantized(layers: Sequence[Kept | Quantized]) -> tuple[Quantized, ...]:
    return tuple(layer for layer in layers if isinstance(layer, Quantized))


def _kept(layers: Sequence[Kept | Quantized]) -> tuple[Kept, ...]:
    return tuple(layer for layer in layers if isinstance(layer, Kept))


def _keeping(
    layers: tuple[Kept | Quantized, ...], keep: Callable[[Quantized], str | None] | None
) -> tuple[tuple[Kept | Quantized, ...], tuple[str, ...]]:
    """The layers, those kept for which `keep` has a reason, and a sentence for each of these."""
    if keep is None:
        return layers, ()
    reasons = {layer.layer: keep(layer) for layer in _quantized(layers)}
    found = {name: reason for name, reason in reasons.items() if reason is not None}
    decided = tuple(
        layer.kept(found[layer.layer]) if isinstance(layer, Quantized) and layer.layer in found else layer
        for layer in layers
    )
    return decided, tuple(f"{name}: kept: {reason}" for name, reason in found.items())


def _file_contents(
    src: Source, layers: Sequence[Kept | Quantized], left_out: frozenset[str]
) -> tuple[tuple[str, ...], tuple[OutputTensor, ...]]:
    """The names of the tensors that are copied, and all tensors of the new file in order."""
    made = [layer for layer in layers if isinstance(layer, (Quantized, Rewritten))]
    consumed = left_out.union(*(layer.consumed for layer in made))
    by_weight = {f"{layer.layer}.weight": layer for layer in made}
    outputs: list[OutputTensor] = []
    copied: list[str] = []
    for name, info in src.tensors.items():
        if name in by_weight:
            outputs += by_weight[name].outputs
        if name not in consumed:
            copied.append(name)
            outputs.append(OutputTensor(name, info.dtype, info.shape))
    return tuple(copied), tuple(outputs)


def _nothing_to_do(src: Source, layers: Sequence[Kept], recipe: Recipe) -> Problem:
    if not layers:
        return Problem(
            f"{src.path}: there is no linear weight (2-D float `.weight`) among its "
            f"{counted(len(src.tensors), 'tensor')}, which are called like {next(iter(src.tensors), '')!r}. Give a "
            "diffusion model or a text encoder; a VAE has only convolutions."
        )
    reasons: dict[str, int] = {}
    for layer in layers:
        reasons[layer.reason] = reasons.get(layer.reason, 0) + 1
    why = "; ".join(f"{count}x {reason}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1])[:4])
    return Problem(
        f"{src.path}: none of the {counted(len(layers), 'linear layer')} would be quantized to {recipe.format.name}: "
        f"{why}. Choose another format or group size.",
        "only",
        Remedy.NAME_LAYERS,
    )


def _metadata(
    src: Source,
    request: Request,
    policy: Policy,
    layers: Sequence[Kept | Quantized],
    calibration: OpenCalibration | None,
) -> dict[str, str]:
    """The new file's header: the source's own entries, the layers' descriptions, and what was asked for.

    policy: the request's, its preset expanded.
    """
    configs: dict[str, Mapping[str, Any]] = {}
    for layer in layers:
        if isinstance(layer, (Quantized, Rewritten)):
            if layer.config is not None:
                configs[layer.layer] = layer.config
        elif layer.stored is not None and layer.stored.form.described:
            configs[layer.layer] = layer.stored.config
    record: dict[str, Any] = {
        "version": __version__,
        "recipe": request.recipe.describe(),
        "source": src.path.name,
        "source_hash": src.identity_hash(),
        "policy": {"keep": list(policy.keep), "only": list(policy.only)},
    }
    decoded = [layer.layer for layer in layers if isinstance(layer, Rewritten) and layer.config is None]
    if decoded:
        record["decoded"] = decoded
    if policy.rules:
        record["policy"]["rules"] = [rule.describe() for rule in policy.rules]
    if request.other_runtime:
        record["other_runtime"] = True
    if policy.fallback is not None:
        record["fallback"] = policy.fallback.describe()
    if calibration is not None:
        seen = sum(calibration.has(layer.layer) for layer in _quantized(layers))
        record["calibration"] = calibration.describe(seen, request.in_order)
    return {**src.metadata, HEADER_KEY: build_header_metadata(configs), RECIPE_KEY: json.dumps(record, sort_keys=True)}


def _warnings(
    src: Source, layers: Sequence[Kept | Quantized], left: Leftovers, calibration: OpenCalibration | None
) -> tuple[str, ...]:
    quantized = _quantized(layers)
    found = (
        None if calibration is None else _without_data(quantized, calibration),
        *_quantized_again(quantized),
        *rewriting_notes(layers),
        _left_out(left),
        _low_rank_on_gptq(quantized, calibration),
        diffusers_warning(src.tensors),
    )
    return tuple(warning for warning in found if warning)


def _leftovers(src: Source, stored: Mapping[str, StoredLayer]) -> Leftovers:
    left = leftovers(src, stored)
    if left.problems:
        raise PlanError([f"{src.path}: {problem}" for problem in left.problems])
    return left


def _larger(before: int, after: int) -> tuple[str, ...]:
    if after < before:
        return ()
    return (
        f"The new file is not smaller than its source: {after:,} bytes, and {before:,} before. It is quantized "
        "already, or little of it is linear layers.",
    )


def _without_data(quantized: Sequence[Quantized], calibration: OpenCalibration) -> str | None:
    unseen = [layer.layer for layer in quantized if not calibration.has(layer.layer)]
    if not unseen:
        return None
    return (
        f"{counted(len(unseen), 'layer has', 'layers have')} no data in the calibration, and go without: "
        f"{some_of(unseen, shown=3)}."
    )


def _quantized_again(quantized: Sequence[Quantized]) -> tuple[str, ...]:
    stored: dict[str, StoredLayer] = {layer.layer: layer.stored for layer in quantized if layer.stored is not None}
    if not stored:
        return ()
    kinds = ", ".join(sorted({layer.source for layer in quantized if layer.stored is not None}))
    warning = (
        f"{counted(len(stored), 'layer is', 'layers are')} quantized already ({kinds}): each is decoded with its own "
        "scales first. Quantizing from the 16-bit model loses less."
    )
    if any("input_scale" in layer.names for layer in stored.values()):
        return warning, "Their input_scale belonged to the old format and is dropped; calibrate again."
    return (warning,)


def _left_out(left: Leftovers) -> str | None:
    if not left.stray:
        return None
    found = counted(len(left.stray), "scale belongs", "scales belong")
    return f"Left out: {found} to no quantized layer: {some_of(left.stray, shown=3)}."


def _low_rank_on_gptq(quantized: Sequence[Quantized], calibration: OpenCalibration | None) -> str | None:
    if not any(layer.gets_low_rank_part and layer.uses_gptq(calibration) for layer in quantized):
        return None
    return "The residual LoRA stands on gptq, where it measured worse than none: take rounding nearest with it."


def _peak_bytes(layers: Sequence[Kept | Quantized], calibration: OpenCalibration | None) -> int:
    """Estimate of the process's peak memory in bytes, on the CPU."""

    def cost(layer: Kept | Quantized) -> int:
        n, k = layer.shape
        if not isinstance(layer, Quantized):
            return _WORK_COPIES * 4 * n * k if isinstance(layer, Rewritten) else 0
        hessian = 0 if calibration is None else calibration.hessian_bytes(layer.layer)
        in_slices = layer.recipe.plain and layer.recipe.format.rows_are_independent and layer.stored is None
        work = _SLICE_BYTES if in_slices else (_WORK_COPIES * 4 + 1) * n * k
        return work + _READ_AHEAD_AND_UNWRITTEN * max(layer.bytes_in, layer.bytes_out) + _HESSIAN_COPIES * hessian

    return _BASE_BYTES + max(cost(layer) for layer in layers)
