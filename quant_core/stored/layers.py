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
from .bnb_state import BnbState, bnb_states
from .canonical import INPUT_SCALE, shape_variants, steps_to, to_canonical
from .configs import layer_configs
from .legacy import modelopt_to_comfy, undescribed_layers
from .suffixes import BESIDE_THE_WEIGHT, QUANT_SUFFIXES

# `hybrid_mxfp8` is MXFP8 with one more number, for GPUs without block scaling; the weight does not depend on it.
_ALIASES = {"hybrid_mxfp8": "mxfp8"}


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One quantized layer. names: {suffix: tensor name in the source}. shape: the logical weight, [N, K].

    kind: "comfy_quant"; "comfy_4bit" and "hybrid_mxfp8" (older comfy_quant forms); "legacy" (fp8_scaled,
    scale_weight), "bare" (no description), "modelopt", "bitsandbytes". config: the comfy_quant object that it
    has or would have.
    """

    layer: str
    format: Format
    config: Mapping[str, Any]
    names: Mapping[str, str]
    shape: tuple[int, int]
    kind: str
    state: BnbState | None = None

    @property
    def described(self) -> bool:
        """Whether the file has a comfy_quant description of it."""
        return self.kind in ("comfy_quant", "comfy_4bit", "hybrid_mxfp8")

    def decode(self, src: Source) -> Tensor:
        """float32 [N, K] on the CPU, in the original basis, with the layer's own scales."""
        if self.state is not None:
            return self.state.decode(src)
        w = self.format.dequantize(self.tensors(src), self.shape)
        if "pre_quant_scale" in self.names:  # the runtime multiplies the inputs by it
            w = w * src.read(self.names["pre_quant_scale"]).to(torch.float32)
        return w

    def tensors(self, src: Source, only: str | None = None) -> dict[str, Tensor]:
        """{suffix: tensor} exactly as the format writes them, `comfy_quant` and what serves the inputs excepted.

        only: one suffix; the others are not read. Raises InputFileError when the layer cannot be written so.
        """
        if self.state is not None:
            return self._from_bitsandbytes(src)
        read = {
            suffix: src.read(name)
            for suffix, name in self.names.items()
            if suffix not in BESIDE_THE_WEIGHT and (only in (None, suffix) or self.kind == "modelopt")
        }
        infos = {suffix: src.tensors[self.names[suffix]] for suffix in read}
        if self.kind == "modelopt":
            read["weight"], read["weight_scale"] = modelopt_to_comfy(read["weight"], read["weight_scale"])
            infos = {
                s: replace(i, dtype={"weight_scale": "F8_E4M3"}.get(s, i.dtype), shape=tuple(read[s].shape))
                for s, i in infos.items()
            }
        specs = {spec.suffix: spec for spec in self.format.tensor_specs(self.shape)}
        result = {
            suffix: to_canonical(self.names[suffix], tensor, infos[suffix], specs[suffix], self.format, self.shape)
            for suffix, tensor in read.items()
            if suffix in specs
        }
        if "weight_codebook" in specs and "weight_codebook" not in self.names:
            result["weight_codebook"] = self._codebook()
        return result

    def input_scale(self, src: Source) -> Tensor | None:
        """float32 (), or None when there is none. Raises InputFileError when it is not one number."""
        name = self.names.get("input_scale")
        if name is None:
            return None
        return to_canonical(name, src.read(name), src.tensors[name], INPUT_SCALE, self.format, self.shape)

    def _codebook(self) -> Tensor:
        """The one in the JSON, as older files have it, or the format's own."""
        listed = self.config.get("quant_map")
        return torch.tensor(listed, dtype=torch.float32) if isinstance(listed, list) else self.format.codebook()

    def _from_bitsandbytes(self, src: Source) -> dict[str, Tensor]:
        n, k = self.shape
        if k % self.format.group_size:
            raise InputFileError(
                f"{self.layer}: its blocks of {self.format.group_size} run over the ends of the rows "
                f"(in_features={k}), which only bitsandbytes itself reads. Requantize the layer instead."
            )
        return {
            "weight": src.read(self.names["weight"]).view(torch.uint8).reshape(n, k // 2),
            "weight_scale": self.state.absmax(src).reshape(n, k // self.format.group_size),
            "weight_codebook": src.read(self.names["quant_map"]).to(torch.float32),
        }


def stored_layers(src: Source) -> dict[str, StoredLayer]:
    """Every layer that the file says, or that its scales show, is quantized; in whatever form this pack knows.

    Lenient about padding and nesting in the JSON, and about scales of another rank or dtype; InputFileError, naming
    the layer, where a layer cannot be decoded.
    """
    found: dict[str, StoredLayer] = {}
    states = {state.layer: state for state in bnb_states(src)}
    for layer, config in layer_configs(src, lenient=True).layers.items():
        if layer not in states:
            found[layer] = describe_layer(src, layer, config, layer_names(src, layer))
    for layer, state in states.items():
        found[layer] = _from_state(src, state)
    for other in undescribed_layers(src, found):
        found[other.layer] = describe_layer(src, other.layer, other.config, other.names, other.kind)
    return found


def layer_names(src: Source, layer: str) -> dict[str, str]:
    """{suffix: tensor name} of what belongs to a layer with a comfy_quant description."""
    names = {suffix: f"{layer}.{suffix}" for suffix in QUANT_SUFFIXES if f"{layer}.{suffix}" in src.tensors}
    if "weight_scale" not in names and f"{layer}.absmax" in src.tensors:
        names["weight_scale"] = f"{layer}.absmax"  # the older comfy form of NF4, FP4 and AF4
    return names


def describe_layer(
    src: Source, layer: str, config: Mapping[str, Any], names: Mapping[str, str], kind: str = "comfy_quant"
) -> StoredLayer:
    """The layer under this config. InputFileError when its tensors do not fit it, or one is missing."""
    if "weight" not in names:
        raise InputFileError(
            f"{src.path}: {layer} has quantization metadata {dict(config)} but no tensor {layer}.weight. "
            "The file is incomplete; take it from its source again."
        )
    name = str(config.get("format"))
    if name in _ALIASES:
        kind = name
    elif names.get("weight_scale") == f"{layer}.absmax":
        kind = "comfy_4bit"
    fmt, shape = _format_and_shape(src, layer, {**config, "format": _ALIASES.get(name, name)}, names)
    for spec in fmt.tensor_specs(shape):
        if spec.suffix not in names:
            if not spec.optional:
                raise InputFileError(
                    f"{src.path}: {layer} is {fmt.on_disk} and lacks {layer}.{spec.suffix}. Run `quantpress "
                    "verify` on the file, or take it from its source again."
                )
            continue
        info = src.tensors[names[spec.suffix]]
        if kind != "modelopt" and steps_to(info, spec, fmt, shape) is None:
            raise InputFileError(
                f"{src.path}: {info.name} is {info.dtype} {list(info.shape)}; {fmt.on_disk} of a {list(shape)} "
                f"weight needs {spec.dtype} {list(spec.shape)}. The metadata names another format than the "
                "data holds: run `quantpress repair` on the file."
            )
    return StoredLayer(layer, fmt, dict(config), dict(names), shape, kind)


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
    return StoredLayer(state.layer, fmt, config, names, state.shape, "bitsandbytes", state)


def config_tensor_name(layer: str) -> str:
    return layer + CONFIG_SUFFIX
