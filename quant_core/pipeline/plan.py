"""The plan: what happens to every tensor, decided from headers alone. It is the dry run, the size and the memory preview."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._version import __version__
from ..calibration.use import OpenCalibration
from ..checkpoint.header import CODE_TO_TORCH, TORCH_TO_CODE, OutputTensor, tensor_bytes
from ..checkpoint.metadata import HEADER_KEY, build_header_metadata, encode_config
from ..checkpoint.source import Source
from ..errors import InputFileError, PlanError, counted, some_of
from ..formats.base import Format
from ..names.diffusers import diffusers_warning
from ..policy.general import Policy
from ..policy.recipe import Recipe
from ..stored.foreign import refusal
from ..stored.layers import StoredLayer, config_tensor_name, stored_layers

RECIPE_KEY = "quantpress"
# Torch, Python and the libraries, before any weight is read; measured on Linux.
_BASE_BYTES = 350_000_000
# Float32 copies of one weight that exist at once: the weight, its prepared form, and slices of temporaries.
_WORK_COPIES = 3
# Rounding to nearest works through a few rows at a time (row_slices.py).
_SLICE_BYTES = 32_000_000
_READ_AHEAD_AND_UNWRITTEN = 3
# Float32 copies of a Hessian: as read, the triangle on disk, damped, and factored.
_HESSIAN_COPIES = 4
_FLOAT_CODES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One linear layer. recipe is None when it is kept, and reason says why.

    source: what its weight is now, a dtype code or a format name. stored: how to decode it when it is quantized.
    config: the comfy_quant object to be written, for quantized layers. consumed: source tensors that the output
    replaces. outputs: the tensors written instead, in order. bias: the bias tensor, when it is to be corrected.
    """

    layer: str
    shape: tuple[int, int]
    source: str
    recipe: Recipe | None
    reason: str
    stored: StoredLayer | None
    config: Mapping[str, Any] | None
    consumed: tuple[str, ...]
    outputs: tuple[OutputTensor, ...]
    bytes_in: int
    bytes_out: int
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """layers: the linear layers in file order. copied: names of all other tensors, copied byte for byte.

    outputs: every tensor of the new file in order. metadata: its header. warnings: sentences for the report.
    """

    layers: tuple[LayerPlan, ...]
    copied: tuple[str, ...]
    outputs: tuple[OutputTensor, ...]
    metadata: Mapping[str, str]
    warnings: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    peak_bytes: int

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.recipe is not None)


def make_plan(
    src: Source,
    recipe: Recipe,
    policy: Policy = Policy(),
    *,
    never_pack: frozenset[str] = frozenset(),
    keep_layers: Mapping[str, str] | None = None,
    source_hash: str | None = None,
    calibration: OpenCalibration | None = None,
) -> Plan:
    """Decide everything before a weight is read.

    never_pack: layers whose weight must keep its stored shape (a loader reads it); they take the policy's fallback, or
    stay. keep_layers: {layer: reason}, layers that stay for a reason found elsewhere (non-finite weights, say).
    source_hash: recorded in the file; computed when None. calibration: refused here when it is of another model. Raises
    PlanError with all problems, RequestError, InputFileError (another quantizer's file).
    """
    stored = stored_layers(src)
    foreign = refusal(src)
    if foreign is not None:
        raise InputFileError(foreign)
    candidates = linear_layers(src, stored)
    policy.check(candidates)
    warnings = (
        ()
        if calibration is None
        else calibration.require_match(
            src,
            {
                layer: stored[layer].shape if layer in stored else src.tensors[f"{layer}.weight"].shape
                for layer in candidates
            },
        )
    )
    layers = tuple(
        _plan_layer(src, layer, stored.get(layer), recipe, policy, never_pack, keep_layers or {})
        for layer in candidates
    )
    if calibration is not None:
        layers = tuple(_calibrated(src, layer, calibration) for layer in layers)
    quantized = [layer for layer in layers if layer.recipe is not None]
    if not quantized:
        raise PlanError([_nothing_to_do(src, layers, recipe)])
    consumed = {name for layer in quantized for name in layer.consumed}
    by_weight = {f"{layer.layer}.weight": layer for layer in quantized}
    outputs: list[OutputTensor] = []
    copied: list[str] = []
    for name, info in src.tensors.items():
        if name in by_weight:
            outputs += by_weight[name].outputs
        if name not in consumed:
            copied.append(name)
            outputs.append(OutputTensor(name, info.dtype, info.shape))
    metadata = _metadata(src, recipe, policy, layers, stored, source_hash, calibration)
    foreign_names = diffusers_warning(src.tensors)
    warnings += _warnings(layers, calibration) + ((foreign_names,) if foreign_names else ())
    return Plan(
        layers,
        tuple(copied),
        tuple(outputs),
        metadata,
        warnings,
        src.nbytes,
        sum(tensor_bytes(o.dtype, o.shape) for o in outputs),
        _peak_bytes(src, quantized, calibration),
    )


def linear_layers(src: Source, stored: Mapping[str, StoredLayer]) -> list[str]:
    """Names of all 2-D float weights and of the layers that are quantized already, in file order."""
    layers = []
    for name, info in src.tensors.items():
        layer = name.removesuffix(".weight")
        if layer != name and (layer in stored or (len(info.shape) == 2 and info.dtype in _FLOAT_CODES)):
            layers.append(layer)
    return layers


def _plan_layer(
    src: Source,
    layer: str,
    stored: StoredLayer | None,
    recipe: Recipe,
    policy: Policy,
    never_pack: frozenset[str],
    keep_layers: Mapping[str, str],
) -> LayerPlan:
    info = src.tensors[f"{layer}.weight"]
    shape = stored.shape if stored else (info.shape[0], info.shape[1])
    rule = policy.rule_for(layer)
    recipe = rule.recipe if rule is not None and rule.recipe is not None else recipe
    reason = keep_layers.get(layer) or policy.reason_to_keep(layer)
    chosen = None
    if reason is None:
        reason = _misfit(recipe.format, shape, layer in never_pack)
        chosen = recipe if reason is None else None
        if reason is not None and policy.fallback is not None:
            other = _misfit(policy.fallback.format, shape, layer in never_pack)
            if other is None:
                chosen, reason = policy.fallback, f"fallback: {reason}"
            else:
                reason = f"{reason}; fallback: {other}"
    names = tuple(stored.names.values()) if stored else (info.name,)
    bytes_in = sum(src.tensors[name].nbytes for name in names)
    source = stored.format.name if stored else info.dtype
    if chosen is None:
        return LayerPlan(layer, shape, source, None, reason or "", stored, None, (), (), bytes_in, bytes_in)
    fmt = chosen.format.for_shape(shape)
    chosen = replace(chosen, format=fmt)
    config = fmt.config(shape, CODE_TO_TORCH[info.dtype] if stored is None else torch.bfloat16)
    config = {**config, **policy.config, **(rule.config if rule is not None else {})}
    outputs = tuple(
        OutputTensor(f"{layer}.{spec.suffix}", TORCH_TO_CODE[spec.dtype], spec.shape)
        for spec in fmt.tensor_specs(shape)
    )
    outputs += (OutputTensor(config_tensor_name(layer), "U8", (encode_config(config).numel(),)),)
    return LayerPlan(
        layer,
        shape,
        source,
        chosen,
        reason or "",
        stored,
        config,
        names,
        outputs,
        bytes_in,
        sum(tensor_bytes(o.dtype, o.shape) for o in outputs),
    )


def _calibrated(src: Source, layer: LayerPlan, calibration: OpenCalibration) -> LayerPlan:
    """With the input scale and the corrected bias that the calibration gives a quantized layer."""
    if layer.recipe is None or not calibration.has(layer.layer):
        return layer
    if calibration.writes_input_scale(layer.layer, layer.recipe.format, layer.config):
        scale = OutputTensor(f"{layer.layer}.input_scale", "F32", ())
        layer = replace(layer, outputs=(*layer.outputs[:-1], scale, layer.outputs[-1]), bytes_out=layer.bytes_out + 4)
    info = src.tensors.get(f"{layer.layer}.bias")
    if (
        not calibration.use.bias_correction
        or info is None
        or info.dtype not in _FLOAT_CODES[:4]
        or info.shape != layer.shape[:1]
    ):
        return layer
    return replace(
        layer,
        bias=info.name,
        consumed=(*layer.consumed, info.name),
        outputs=(*layer.outputs, OutputTensor(info.name, info.dtype, info.shape)),
    )


def _misfit(fmt: Format, shape: tuple[int, int], fixed_shape: bool) -> str | None:
    """Why this weight cannot take the format; None when it can."""
    problem = fmt.problem(shape)
    if problem is None and fixed_shape and fmt.for_shape(shape).tensor_specs(shape)[0].shape != tuple(shape):
        return f"ComfyUI's model detection reads its shape, and {fmt.name} packs or pads it"
    return problem


def _nothing_to_do(src: Source, layers: tuple[LayerPlan, ...], recipe: Recipe) -> str:
    if not layers:
        return (
            f"{src.path}: there is no linear weight (2-D float `.weight`) among its {counted(len(src.tensors), 'tensor')}, which are called "
            f"like {next(iter(src.tensors), '')!r}. Give a diffusion model or a text encoder; a VAE has only convolutions."
        )
    reasons: dict[str, int] = {}
    for layer in layers:
        reasons[layer.reason] = reasons.get(layer.reason, 0) + 1
    why = "; ".join(f"{count}x {reason}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1])[:4])
    return (
        f"{src.path}: none of the {counted(len(layers), 'linear layer')} would be quantized to {recipe.format.name}: {why}. "
        "Choose another format or group size, or name the layers in only."
    )


def _metadata(
    src: Source,
    recipe: Recipe,
    policy: Policy,
    layers: tuple[LayerPlan, ...],
    stored: Mapping[str, StoredLayer],
    source_hash: str | None,
    calibration: OpenCalibration | None,
) -> dict[str, str]:
    configs: dict[str, Mapping[str, Any]] = {}
    for layer in layers:
        if layer.config is not None:
            configs[layer.layer] = layer.config
        elif layer.stored is not None and layer.stored.described:
            configs[layer.layer] = layer.stored.config
    record: dict[str, Any] = {
        "version": __version__,
        "recipe": recipe.describe(),
        "source": src.path.name,
        "source_hash": source_hash or src.identity_hash(),
        "policy": {"keep": list(policy.keep), "only": list(policy.only)},
    }
    if policy.rules:
        record["policy"]["rules"] = [rule.describe() for rule in policy.rules]
    if policy.fallback is not None:
        record["fallback"] = policy.fallback.describe()
    if calibration is not None:
        record["calibration"] = calibration.describe(
            sum(layer.recipe is not None and calibration.has(layer.layer) for layer in layers)
        )
    return {**src.metadata, HEADER_KEY: build_header_metadata(configs), RECIPE_KEY: json.dumps(record, sort_keys=True)}


def _warnings(layers: tuple[LayerPlan, ...], calibration: OpenCalibration | None) -> tuple[str, ...]:
    warnings = []
    if calibration is not None:
        unseen = [layer.layer for layer in layers if layer.recipe is not None and not calibration.has(layer.layer)]
        if unseen:
            warnings.append(
                f"{counted(len(unseen), 'layer has', 'layers have')} no data in the calibration, and go without: "
                f"{some_of(unseen, shown=3)}."
            )
    again = [layer for layer in layers if layer.recipe is not None and layer.stored is not None]
    if again:
        kinds = ", ".join(sorted({layer.source for layer in again}))
        warnings.append(
            f"{counted(len(again), 'layer is', 'layers are')} quantized already ({kinds}): each is decoded with its own scales first. "
            "Quantizing from the 16-bit model loses less."
        )
        if any("input_scale" in layer.stored.names for layer in again if layer.stored):
            warnings.append("Their input_scale belonged to the old format and is dropped; calibrate again.")
    foreign = sorted(
        {
            layer.stored.kind
            for layer in layers
            if layer.stored is not None and layer.recipe is None and not layer.stored.described
        }
    )
    if foreign:
        warnings.append(
            f"Kept layers stay in the {' and '.join(foreign)} form, next to comfy_quant ones, and ComfyUI reads "
            "only one form per file: migrate the source first, or quantize all its layers."
        )
    return tuple(warnings)


def _peak_bytes(src: Source, quantized: list[LayerPlan], calibration: OpenCalibration | None) -> int:
    """Estimate of the process's peak memory in bytes, on the CPU."""

    def cost(layer: LayerPlan) -> int:
        n, k = layer.shape
        hessian = 0 if calibration is None else calibration.hessian_bytes(layer.layer)
        in_slices = layer.recipe.plain and layer.recipe.format.rows_are_independent and layer.stored is None
        work = _SLICE_BYTES if in_slices else (_WORK_COPIES * 4 + 1) * n * k
        return work + _READ_AHEAD_AND_UNWRITTEN * max(layer.bytes_in, layer.bytes_out) + _HESSIAN_COPIES * hessian

    return _BASE_BYTES + max(cost(layer) for layer in quantized)
