"""What an open file says about its quantized layers: the comfy_quant tensors and the header's copy, compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ..checkpoint.metadata import CONFIG_SUFFIX, HEADER_KEY, Config, decode_config, parse_header_metadata, same_json
from ..checkpoint.source import Source


class MismatchKind(Enum):
    """How the two descriptions of a layer disagree. The value reads well in a sentence."""

    HEADER_ONLY = "only in the header"
    TENSOR_ONLY = "only in a comfy_quant tensor"
    DIFFERING = "different in the header and in the comfy_quant tensor"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A layer that the file describes in one place only, or in two different ways."""

    layer: str
    kind: MismatchKind
    detail: str


@dataclass(frozen=True, slots=True)
class LayerConfigs:
    """layers: what ComfyUI will use. findings: what a lenient reading repaired, one sentence each; empty if strict."""

    layers: dict[str, Config]
    mismatches: tuple[Mismatch, ...]
    findings: tuple[str, ...]


def layer_configs(src: Source, lenient: bool = False) -> LayerConfigs:
    """Both descriptions of every quantized layer of an open source, compared.

    Where they differ `layers` has the header's: ComfyUI overwrites the tensor with it. Reads only the comfy_quant
    tensors. Raises InputFileError, naming the layer.
    """
    findings: list[str] = []
    in_tensors: dict[str, Config] = {}
    for name in src.tensors:
        layer = name.removesuffix(CONFIG_SUFFIX)
        if layer == name:
            continue
        if lenient:
            in_tensors[layer], found = decode_config(src.read(name), layer, lenient=True)
            findings += found
        else:
            in_tensors[layer] = decode_config(src.read(name), layer)
    in_header: dict[str, Config] = {}
    text = src.metadata.get(HEADER_KEY)
    if text is not None and lenient:
        in_header, found = parse_header_metadata(text, lenient=True)
        findings += found
    elif text is not None:
        in_header = parse_header_metadata(text)
    return LayerConfigs({**in_tensors, **in_header}, tuple(_compare(in_tensors, in_header)), tuple(findings))


def _compare(in_tensors: Mapping[str, Config], in_header: Mapping[str, Config]) -> list[Mismatch]:
    mismatches = []
    for layer, config in in_tensors.items():
        if layer not in in_header:
            mismatches.append(Mismatch(layer, MismatchKind.TENSOR_ONLY, f"tensor: {json.dumps(config)}"))
        elif not same_json(config, in_header[layer]):
            detail = f"header: {json.dumps(in_header[layer])}; tensor: {json.dumps(config)}"
            mismatches.append(Mismatch(layer, MismatchKind.DIFFERING, detail))
    for layer, config in in_header.items():
        if layer not in in_tensors:
            mismatches.append(Mismatch(layer, MismatchKind.HEADER_ONLY, f"header: {json.dumps(config)}"))
    return mismatches
