"""The layers of a checkpoint that are already quantized, and how to decode them with their own scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.metadata import CONFIG_SUFFIX
from ..checkpoint.source import Source
from ..errors import InputFileError, RequestError
from ..formats import format_of_layer, get_format
from ..formats.base import Format
from ..formats.families.codebook import CodebookFormat
from .bnb_state import BnbState, bnb_states
from .configs import layer_configs
from .fit import INPUT_SCALE, Part, Step, fit, fit_layer, shape_variants
from .form import Form
from .legacy import REORDERED, modelopt_to_comfy, undescribed_layers
from .suffixes import BESIDE_THE_WEIGHT, QUANT_SUFFIXES
from .unread import codes_problem, require_known

# `hybrid_mxfp8` is MXFP8 with one more number, for GPUs without block scaling; the weight does not depend on it.
_ALIASES = {"hybrid_mxfp8": "mxfp8"}


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One quantized layer. names: {suffix: tensor name in the source}. shape: the logical weight, [N, K].

    config: the comfy_quant object that it has or would have. parts: {suffix: part} of what the file holds of that
    which the format writes, and of `input_scale`.
    """

    layer: str
    format: Format
    config: Mapping[str, Any]
    names: Mapping[str, str]
    shape: tuple[int, int]
    form: Form
    parts: Mapping[str, Part]

    def decode(self, src: Source) -> Tensor:
        """float32 [N, K] on the CPU, in the original basis, with the layer's own scales."""
        w = self.format.dequantize(self.tensors(src), self.shape)
        if "pre_quant_scale" in self.names:  # the runtime multiplies the inputs by it
            w = w * src.read(self.names["pre_quant_scale"]).to(torch.float32)
        return w

    def tensors(self, src: Source) -> dict[str, Tensor]:
        """{suffix: tensor} exactly as the format writes them, `comfy_quant` and what serves the inputs excepted.

        Raises InputFileError when the layer cannot be written so.
        """
        suffixes = [suffix for suffix in self.parts if suffix not in BESIDE_THE_WEIGHT]
        if isinstance(self.format, CodebookFormat):
            suffixes.append("weight_codebook")
        return {suffix: self.tensor(src, suffix) for suffix in dict.fromkeys(suffixes)}

    def tensor(self, src: Source, suffix: str) -> Tensor:
        """One of `tensors`. Raises as that does."""
        part = self.parts.get(suffix)
        if part is not None:
            return part.convert(src.read(part.found.name))
        listed = self.config.get("quant_map")  # the codebook is in the JSON of older files
        if isinstance(listed, list):
            return torch.tensor(listed, dtype=torch.float32)
        assert isinstance(self.format, CodebookFormat), suffix  # of the others nothing is optional
        return self.format.codebook()

    def input_scale(self, src: Source) -> Tensor | None:
        """float32 (), or None when there is none. Raises InputFileError when it is not one number."""
        return self.tensor(src, "input_scale") if "input_scale" in self.parts else None


@dataclass(frozen=True, slots=True)
class ModelOptLayer(StoredLayer):
    """Weight and block scales are in ModelOpt's order, and only together can they be put right."""

    def tensors(self, src: Source) -> dict[str, Tensor]:
        ordered = self._in_order(src)
        return ordered | {s: self.tensor(src, s) for s in self.parts if s not in (*ordered, *BESIDE_THE_WEIGHT)}

    def tensor(self, src: Source, suffix: str) -> Tensor:
        # Not super(): dataclass makes a new class for the slots, which super() without arguments does not know.
        return self._in_order(src)[suffix] if suffix in REORDERED else StoredLayer.tensor(self, src, suffix)

    def _in_order(self, src: Source) -> dict[str, Tensor]:
        weight, scale = modelopt_to_comfy(*(src.read(self.names[suffix]) for suffix in REORDERED))
        return {"weight": self._fitted("weight", weight), "weight_scale": self._fitted("weight_scale", scale)}

    def _fitted(self, suffix: str, tensor: Tensor) -> Tensor:
        part = self.parts[suffix]
        dtype = "F8_E4M3" if suffix == "weight_scale" else part.found.dtype
        found = replace(part.found, dtype=dtype, shape=tuple(tensor.shape))
        return fit(part.spec, found, self.format, self.shape).convert(tensor)


@dataclass(frozen=True, slots=True)
class BitsAndBytesLayer(StoredLayer):
    """Only its weight is as the format writes it; the rest follows from its state."""

    state: BnbState

    def decode(self, src: Source) -> Tensor:
        return self.state.decode(src)

    def tensors(self, src: Source) -> dict[str, Tensor]:
        suffixes = ("weight", "weight_scale", "weight_codebook")
        return {suffix: self.tensor(src, suffix) for suffix in suffixes}

    def tensor(self, src: Source, suffix: str) -> Tensor:
        (n, k), block = self.shape, self.state.block_size
        if k % block:
            raise InputFileError(
                f"{self.layer}: its blocks of {block} run over the ends of the rows (in_features={k}), which only "
                "bitsandbytes itself reads. Requantize the layer instead."
            )
        if suffix == "weight":
            return src.read(self.names["weight"]).view(torch.uint8).reshape(n, k // 2)
        if suffix == "weight_scale":
            return self.state.absmax(src).reshape(n, k // block)
        return src.read(self.names["quant_map"]).to(torch.float32)


def stored_layers(src: Source, scale_name: str | None = None) -> dict[str, StoredLayer]:
    """Every layer that the file says, or that its scales show, is quantized; in whatever form this pack knows.

    scale_name: how the scales are called, where they have a name that is not known; they multiply the codes.
    Lenient about padding and nesting in the JSON, and about scales of another rank or dtype; InputFileError, naming
    the layer, where a layer cannot be decoded, and for the files of other quantizers. RequestError: no scale is
    called scale_name.
    """
    require_known(src, scales_named=scale_name is not None)
    found: dict[str, StoredLayer] = {}
    states = {state.layer: state for state in bnb_states(src)}
    for layer, config in layer_configs(src, lenient=True).layers.items():
        if layer not in states:
            found[layer] = describe_layer(src, layer, config, layer_names(src, layer))
    for layer, state in states.items():
        found[layer] = _from_state(src, state)
    for other in undescribed_layers(src, found, scale_name):
        found[other.layer] = describe_layer(src, other.layer, other.config, other.names, other.form)
    problem = codes_problem(src, found)
    if problem is not None:
        raise InputFileError(f"{src.path}: {problem}")
    return found


def layer_names(src: Source, layer: str) -> dict[str, str]:
    """{suffix: tensor name} of what belongs to a layer with a comfy_quant description."""
    names = {suffix: f"{layer}.{suffix}" for suffix in QUANT_SUFFIXES if f"{layer}.{suffix}" in src.tensors}
    if "weight_scale" not in names and f"{layer}.absmax" in src.tensors:
        names["weight_scale"] = f"{layer}.absmax"  # the older comfy form of NF4, FP4 and AF4
    return names


def describe_layer(
    src: Source, layer: str, config: Mapping[str, Any], names: Mapping[str, str], form: Form = Form.COMFY_QUANT
) -> StoredLayer:
    """The layer under this config. InputFileError when its tensors do not fit it, or one is missing."""
    if "weight" not in names:
        raise InputFileError(
            f"{src.path}: {layer} has quantization metadata {dict(config)} but no tensor {layer}.weight. "
            "The file is incomplete; take it from its source again."
        )
    name = str(config.get("format"))
    if name in _ALIASES:
        form = Form.HYBRID_MXFP8
    elif names.get("weight_scale") == f"{layer}.absmax":
        form = Form.COMFY_4BIT
    fmt, shape = _format_and_shape(src, layer, {**config, "format": _ALIASES.get(name, name)}, names)
    parts = _parts(src, layer, fmt, shape, names, form)
    kind = ModelOptLayer if form is Form.MODELOPT else StoredLayer
    return kind(layer, fmt, dict(config), dict(names), shape, form, parts)


def _parts(
    src: Source, layer: str, fmt: Format, shape: tuple[int, int], names: Mapping[str, str], form: Form
) -> dict[str, Part]:
    infos = {suffix: src.tensors[name] for suffix, name in names.items()}
    found = fit_layer(fmt, shape, infos)
    for spec in fmt.tensor_specs(shape):
        part = found.parts.get(spec.suffix)
        if part is None and not spec.optional:
            raise InputFileError(
                f"{src.path}: {layer} is {fmt.on_disk} and lacks {layer}.{spec.suffix}. Run `quantpress "
                "verify` on the file, or take it from its source again."
            )
        if part is not None and part.steps is None and form is not Form.MODELOPT:
            raise part.error(f"{src.path}: ")
    parts = dict(found.parts)
    if form is Form.MODELOPT:  # whether they fit shows when they are in order
        parts |= {suffix: replace(parts[suffix], steps=(Step.REORDER,)) for suffix in REORDERED}
    if "input_scale" in infos:  # one that does not fit is an error of those who need it
        parts.setdefault("input_scale", fit(INPUT_SCALE, infos["input_scale"], fmt, shape))
    return parts


def _format_and_shape(
    src: Source, layer: str, config: dict[str, Any], names: Mapping[str, str]
) -> tuple[Format, tuple[int, int]]:
    error: RequestError | None = None
    for shapes in shape_variants({suffix: src.tensors[name].shape for suffix, name in names.items()}):
        try:
            fmt = format_of_layer(layer, config, shapes)
            shape = fmt.shape_from(shapes, config)
            fmt.tensor_specs(shape)
            return fmt, shape
        except RequestError as err:
            error = error or err
    raise InputFileError(f"{src.path}: {error}") from error


def _from_state(src: Source, state: BnbState) -> StoredLayer:
    if len(state.shape) != 2:
        raise InputFileError(
            f"{src.path}: {state.layer} is a bitsandbytes weight of shape {list(state.shape)}; only linear "
            "weights with two dimensions are read. Take the unquantized model instead."
        )
    fmt = replace(get_format(f"bnb_{state.quant_type}"), group_size=state.block_size)
    config = {
        "format": fmt.on_disk,
        "group_size": state.block_size,
        "quant_type": state.quant_type,
        "dtype": state.dtype,
        "shape": list(state.shape),
    }
    names = {**state.names}
    if f"{state.layer}{CONFIG_SUFFIX}" in src.tensors:
        names["comfy_quant"] = f"{state.layer}{CONFIG_SUFFIX}"
    packed = replace(
        fit(fmt.tensor_specs(state.shape)[0], src.tensors[names["weight"]], fmt, state.shape), steps=(Step.FLAT,)
    )
    return BitsAndBytesLayer(
        state.layer, fmt, config, names, state.shape, Form.BITSANDBYTES, {"weight": packed}, state
    )


def config_tensor_name(layer: str) -> str:
    return layer + CONFIG_SUFFIX
