"""What happens to one linear layer, decided from headers alone: it is kept, as it is or rewritten, or quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..algorithms.auto import AutoRounding
from ..algorithms.rounders.gptq import Gptq
from ..calibration.use import OpenCalibration
from ..checkpoint.header import CODE_TO_TORCH, TORCH_TO_CODE, OutputTensor, tensor_bytes
from ..checkpoint.metadata import encode_config
from ..checkpoint.source import Source
from ..formats.base import Format
from ..policy.general import Policy
from ..policy.recipe import Recipe
from ..stored.layers import StoredLayer, config_tensor_name
from .model_rules import ModelRules

_FLOAT_CODES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_BIAS_CODES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One linear layer of the source: Kept or Quantized. shape: the weight's, [N, K].

    source: what the weight is now, a dtype code or a format name. stored: how to decode it when it is quantized
    already. bytes_in: of all tensors that belong to the weight. reason: why the layer is kept, or why it got the
    fallback; "" for what was asked for.
    """

    layer: str
    shape: tuple[int, int]
    source: str
    stored: StoredLayer | None
    bytes_in: int
    reason: str


@dataclass(frozen=True, slots=True)
class Kept(LayerPlan):
    """A layer that stays as it is, for the reason given."""

    @property
    def bytes_out(self) -> int:
        return self.bytes_in


@dataclass(frozen=True, slots=True)
class Rewritten(Kept):
    """A kept layer that ComfyUI would not read beside the new ones as it is: see kept_layers.py.

    config: its comfy_quant object; None when it is decoded. consumed, outputs: as for Quantized.
    """

    config: Mapping[str, Any] | None
    consumed: tuple[str, ...]
    outputs: tuple[OutputTensor, ...]

    @property
    def bytes_out(self) -> int:
        return sum(tensor_bytes(o.dtype, o.shape) for o in self.outputs)


@dataclass(frozen=True, slots=True)
class Quantized(LayerPlan):
    """A layer that becomes another. config: its comfy_quant object. consumed: source tensors that the output replaces.

    outputs: the tensors written instead, in order. bias: the name of the bias, where that is to be corrected.
    """

    recipe: Recipe
    config: Mapping[str, Any]
    consumed: tuple[str, ...]
    outputs: tuple[OutputTensor, ...]
    bias: str | None = None

    @property
    def bytes_out(self) -> int:
        """Of what replaces the weight; a corrected bias is as large as before and does not count."""
        return sum(tensor_bytes(o.dtype, o.shape) for o in self.outputs if o.name != self.bias)

    @property
    def gets_low_rank_part(self) -> bool:
        return self.recipe.residual.wants(self.layer)

    def uses_gptq(self, calibration: OpenCalibration | None) -> bool:
        """Whether gptq rounds it, "auto" resolved by what the calibration holds."""
        if isinstance(self.recipe.rounding, AutoRounding):
            return calibration is not None and calibration.hessian_bytes(self.layer) > 0
        return isinstance(self.recipe.rounding, Gptq)

    def kept(self, reason: str) -> Kept:
        return Kept(self.layer, self.shape, self.source, self.stored, self.bytes_in, reason)


def linear_layers(src: Source, stored: Mapping[str, StoredLayer]) -> list[str]:
    """Names of all 2-D float weights and of the layers that are quantized already, in file order."""
    layers = []
    for name, info in src.tensors.items():
        layer = name.removesuffix(".weight")
        if layer != name and (layer in stored or (len(info.shape) == 2 and info.dtype in _FLOAT_CODES)):
            layers.append(layer)
    return layers


def weight_shape(src: Source, layer: str, stored: Mapping[str, StoredLayer]) -> tuple[int, int]:
    """[N, K] of a layer of `linear_layers`, decoded if it is quantized."""
    if layer in stored:
        return stored[layer].shape
    n, k = src.tensors[f"{layer}.weight"].shape
    return n, k


class LayerPlanner:
    """Plans single layers of one source."""

    def __init__(
        self,
        src: Source,
        stored: Mapping[str, StoredLayer],
        recipe: Recipe,
        policy: Policy,
        model: ModelRules,
        calibration: OpenCalibration | None,
    ) -> None:
        self._src, self._stored, self._calibration = src, stored, calibration
        self._recipe, self._policy, self._model = recipe, policy, model

    def plan(self, layer: str) -> Kept | Quantized:
        stored = self._stored.get(layer)
        info = self._src.tensors[f"{layer}.weight"]
        names = tuple(stored.names.values()) if stored else (info.name,)
        known = LayerPlan(
            layer,
            weight_shape(self._src, layer, self._stored),
            stored.format.name if stored else info.dtype,
            stored,
            sum(self._src.tensors[name].nbytes for name in names),
            "",
        )
        recipe, reason = self._choose(known)
        if recipe is None:
            return Kept(layer, known.shape, known.source, stored, known.bytes_in, reason)
        recipe = replace(recipe, format=recipe.format.for_shape(known.shape))
        config, outputs = self._written(known, recipe, info.dtype)
        quantized = Quantized(
            layer, known.shape, known.source, stored, known.bytes_in, reason, recipe, config, names, outputs
        )
        return self._calibrated(quantized)

    def _choose(self, layer: LayerPlan) -> tuple[Recipe | None, str]:
        """The recipe, None to keep the layer, and the reason."""
        rule, policy = self._policy.rule_for(layer.layer), self._policy
        reason = self._model.reason_to_keep(layer.layer, policy)
        if reason is not None:
            return None, reason
        fixed = self._model.keeps_shape(layer.layer)
        recipe = rule.recipe if rule is not None and rule.recipe is not None else self._recipe
        problem = _misfit(recipe.format, layer.shape, fixed)
        if problem is None:
            return recipe, ""
        if policy.fallback is None:
            return None, problem
        other = _misfit(policy.fallback.format, layer.shape, fixed)
        return (policy.fallback, f"fallback: {problem}") if other is None else (None, f"{problem}; fallback: {other}")

    def _written(
        self, layer: LayerPlan, recipe: Recipe, dtype: str
    ) -> tuple[Mapping[str, Any], tuple[OutputTensor, ...]]:
        """The comfy_quant object and the tensors. dtype: the source's code, which ComfyUI computes in."""
        rule = self._policy.rule_for(layer.layer)
        config = recipe.format.config(layer.shape, CODE_TO_TORCH[dtype] if layer.stored is None else torch.bfloat16)
        config = {**config, **self._policy.config, **(rule.config if rule is not None else {})}
        outputs = tuple(
            OutputTensor(f"{layer.layer}.{spec.suffix}", TORCH_TO_CODE[spec.dtype], spec.shape)
            for spec in recipe.format.tensor_specs(layer.shape)
        )
        return config, (
            *outputs,
            OutputTensor(config_tensor_name(layer.layer), "U8", (encode_config(config).numel(),)),
        )

    def _calibrated(self, layer: Quantized) -> Quantized:
        """With the input scale and the corrected bias that the calibration gives it."""
        calibration = self._calibration
        if calibration is None or not calibration.has(layer.layer):
            return layer
        if calibration.writes_input_scale(layer.layer, layer.recipe.format, layer.config):
            scale = OutputTensor(f"{layer.layer}.input_scale", "F32", ())
            layer = replace(layer, outputs=(*layer.outputs[:-1], scale, layer.outputs[-1]))
        info = self._src.tensors.get(f"{layer.layer}.bias")
        if (
            not calibration.use.bias_correction
            or info is None
            or info.dtype not in _BIAS_CODES
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
