"""The layers of a checkpoint that are already quantized, and how to decode them with their own scales."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputFileError, RequestError
from ..format import Format, format_of_layer
from .header import CODE_TO_TORCH
from .metadata import CONFIG_SUFFIX, layer_configs
from .source import Source

# Everything that belongs to a quantized weight; `<layer>.bias` does not, it stays as it is.
QUANT_SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "weight_zeros", "weight_s_rel", "weight_s_channel",
                  "weight_codebook", "input_scale", "pre_quant_scale", "comfy_quant")
# Legacy fp8_scaled and INT8 files name the same tensors differently.
LEGACY_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
LEGACY_MARKER = "scaled_fp8"


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One quantized layer. names: {suffix: tensor name in the source}. shape: the logical weight, [N, K].

    kind: "comfy_quant", or "legacy" for fp8_scaled and scale_weight files.
    """

    layer: str
    format: Format
    config: Mapping[str, Any]
    names: Mapping[str, str]
    shape: tuple[int, int]
    kind: str

    def decode(self, src: Source) -> Tensor:
        """float32 [N, K] on the CPU, in the original basis, with the layer's own scales."""
        tensors = {suffix: src.read(name) for suffix, name in self.names.items()
                   if suffix not in ("comfy_quant", "input_scale", "pre_quant_scale")}
        w = self.format.dequantize(tensors, self.shape)
        if "pre_quant_scale" in self.names:                  # the runtime multiplies the inputs by it
            w = w * src.read(self.names["pre_quant_scale"]).to(torch.float32)
        return w


def stored_layers(src: Source) -> dict[str, StoredLayer]:
    """Every layer that the file says, or that its legacy scales show, is quantized.

    Lenient about padding and nesting in the JSON; InputFileError, naming the layer, where a layer cannot be decoded.
    """
    found: dict[str, StoredLayer] = {}
    for layer, config in layer_configs(src, lenient=True).layers.items():
        names = {suffix: f"{layer}.{suffix}" for suffix in QUANT_SUFFIXES if f"{layer}.{suffix}" in src.tensors}
        found[layer] = _stored(src, layer, config, names, "comfy_quant")
    for name in src.tensors:
        layer = name.removesuffix(".scale_weight")
        weight = src.tensors.get(f"{layer}.weight")
        if layer == name or layer in found or weight is None:
            continue
        if weight.dtype in ("F8_E4M3", "F8_E5M2", "I8"):     # a scale beside a 16-bit weight is a dummy
            names = {"weight": f"{layer}.weight"} | {
                suffix: f"{layer}.{old}" for old, suffix in LEGACY_NAMES.items() if f"{layer}.{old}" in src.tensors}
            found[layer] = _stored(src, layer, _legacy_config(src, layer), names, "legacy")
    return found


def _stored(src: Source, layer: str, config: Mapping[str, Any], names: dict[str, str], kind: str) -> StoredLayer:
    if "weight" not in names:
        raise InputFileError(f"{src.path}: {layer} has quantization metadata {dict(config)} but no tensor {layer}.weight. "
                             "The file is incomplete; take it from its source again.")
    shapes = {suffix: src.tensors[name].shape for suffix, name in names.items()}
    try:
        fmt = format_of_layer(layer, dict(config), shapes)
        shape = fmt.shape_from(shapes, dict(config))
        specs = {spec.suffix: spec for spec in fmt.tensor_specs(shape)}
    except RequestError as err:
        raise InputFileError(f"{src.path}: {err}") from err
    for suffix, spec in specs.items():
        if suffix not in names and suffix not in ("input_scale", "weight_codebook"):
            raise InputFileError(f"{src.path}: {layer} is {fmt.on_disk} and lacks {layer}.{suffix}. Run `quantpress verify` "
                                 "on the file, or take it from its source again.")
    weight = src.tensors[names["weight"]]
    if CODE_TO_TORCH.get(weight.dtype) is None or CODE_TO_TORCH[weight.dtype].itemsize != specs["weight"].dtype.itemsize:
        raise InputFileError(f"{src.path}: {layer}.weight is {weight.dtype}, {fmt.on_disk} stores {specs['weight'].dtype}. "
                             "The metadata names another format than the data holds; repair it first.")
    if weight.shape != specs["weight"].shape:
        raise InputFileError(f"{src.path}: {layer}.weight has shape {list(weight.shape)}, {fmt.on_disk} of a "
                             f"{list(shape)} weight needs {list(specs['weight'].shape)}. Repair the file first.")
    return StoredLayer(layer, fmt, config, names, shape, kind)


def _legacy_config(src: Source, layer: str) -> dict[str, Any]:
    """The comfy_quant object that a legacy layer would have: the format follows from dtype and scale shape."""
    weight, scale = src.tensors[f"{layer}.weight"], src.tensors[f"{layer}.scale_weight"].shape
    base = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8"}[weight.dtype]
    rows, cols = weight.shape if len(weight.shape) == 2 else (0, 0)
    if scale in ((), (1,)):
        return {"format": "int8_tensorwise" if base == "int8" else base}
    if base == "int8" and scale == (rows, 1):
        return {"format": "int8_tensorwise", "per_row": True}
    if base == "float8_e4m3fn" and scale == (rows,):
        return {"format": "float8_e4m3fn_rowwise"}
    if base != "float8_e5m2" and len(scale) in (2, 3) and scale[1] and cols % scale[1] == 0:
        group = cols // scale[1]
        if len(scale) == 3 and scale[0] == rows and base == "float8_e4m3fn":
            return {"format": "float8_e4m3fn_block3d", "group_size": group}
        if len(scale) == 2 and scale[0] == rows and base == "int8":
            return {"format": "int8_lodewise", "group_size": group}
        if len(scale) == 2 and scale[0] * group == rows:
            return {"format": f"{base}_blockwise", "group_size": group}
    raise InputFileError(f"{src.path}: {layer}.scale_weight has shape {list(scale)} beside a {weight.dtype} weight of shape "
                         f"{list(weight.shape)}; no known legacy layout has that. Take the unquantized model instead.")


def config_tensor_name(layer: str) -> str:
    return layer + CONFIG_SUFFIX
