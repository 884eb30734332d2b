"""What a file says about its quantized layers: `<layer>.comfy_quant` tensors and the header's copy of them.

Both hold one flat JSON object per layer, with at least `format`. Stock ComfyUI does
`json.loads(tensor.numpy().tobytes())`, so a single NUL of padding keeps a file from loading.
Source: ComfyUI 0.29+ comfy/ops.py (MixedPrecisionOps), comfy/utils.py (convert_old_quants).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Literal, overload

import torch
from torch import Tensor

from ..errors import InputFileError, RequestError
from .header import load_json_object

CONFIG_SUFFIX = ".comfy_quant"
HEADER_KEY = "_quantization_metadata"
FORMAT_VERSION = "1.0"

Config = dict[str, object]


def encode_config(config: Mapping[str, object], *, complete: bool = True) -> Tensor:
    """The bytes of a `comfy_quant` tensor: uint8 1-D on the CPU, UTF-8 JSON, keys in the order given, no padding.

    Separators are json.dumps's defaults, so that the bytes equal what ComfyUI's own ModelSave writes.
    complete: False lets one without `format` pass, which no loader reads.
    Raises RequestError: no `format`, a nested object, NaN or Infinity, no JSON type.
    """
    _require_valid(config if complete else {"format": "any", **config}, "the layer config")
    return torch.frombuffer(bytearray(_dump(config, "the layer config")), dtype=torch.uint8)


@overload
def decode_config(tensor: Tensor, layer: str, lenient: Literal[False] = False) -> Config: ...
@overload
def decode_config(tensor: Tensor, layer: str, lenient: Literal[True]) -> tuple[Config, list[str]]: ...
def decode_config(tensor: Tensor, layer: str, lenient: bool = False) -> Config | tuple[Config, list[str]]:
    """The config that `<layer>.comfy_quant` holds; with lenient=True a pair of it and of what had to be repaired.

    Lenient strips NULs at the end and lifts the members of a nested `params` object to the root, where a key that is
    already there stays (as ComfyUI reads it). Everything else that is wrong raises InputFileError in both modes.
    """
    where = f"{layer}{CONFIG_SUFFIX}"
    if tensor.dtype is not torch.uint8 or tensor.dim() != 1:
        raise InputFileError(
            f"{where} is {tensor.dtype} of shape {tuple(tensor.shape)}; uint8 with one dimension is "
            "needed. Quantize the source again, or repair the file."
        )
    data = tensor.cpu().numpy().tobytes()
    findings: list[str] = []
    stripped = data.rstrip(b"\0")
    if not stripped:
        raise InputFileError(
            f"{where} is empty ({len(data)} bytes, all NUL); a JSON object is needed. Quantize the source again."
        )
    if len(stripped) < len(data):
        note = f"{where} is padded with {len(data) - len(stripped)} NUL bytes, which stock ComfyUI cannot parse"
        if not lenient:
            raise InputFileError(f"{note}. Repair the file (a lenient reading strips them).")
        findings.append(f"{note}; they were stripped.")
    config = load_json_object(stripped, where)
    if lenient:
        config = _flatten_params(config, where, findings)
    _check_read_config(config, where)
    return (config, findings) if lenient else config


def build_header_metadata(layers: Mapping[str, Mapping[str, object]]) -> str:
    """The header's `_quantization_metadata` for these layers, in the order given. Raises RequestError."""
    for layer, config in layers.items():
        _require_valid(config, f"{layer}: the layer config")
    content = {"format_version": FORMAT_VERSION, "layers": {layer: dict(config) for layer, config in layers.items()}}
    return _dump(content, HEADER_KEY).decode("utf-8")


@overload
def parse_header_metadata(text: str, lenient: Literal[False] = False) -> dict[str, Config]: ...
@overload
def parse_header_metadata(text: str, lenient: Literal[True]) -> tuple[dict[str, Config], list[str]]: ...
def parse_header_metadata(text: str, lenient: bool = False) -> dict[str, Config] | tuple[dict[str, Config], list[str]]:
    """Layer -> config from the header's `_quantization_metadata`; with lenient=True a pair of it and of the repairs.

    A missing `format_version` is accepted (ComfyUI never reads it), one other than "1.0" is not. Lenient lifts nested
    `params` as decode_config does. Raises InputFileError.
    """
    content, layers = _load_header_metadata(text)
    version = content.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise InputFileError(
            f"{HEADER_KEY} has format_version {short(version)}; this pack reads {FORMAT_VERSION!r}. "
            "Update the pack, or take a file of that version."
        )
    findings: list[str] = []
    configs = {}
    for layer, config in layers.items():
        where = f"{layer}: the config in {HEADER_KEY}"
        if not isinstance(config, dict):
            raise InputFileError(f"{where} is {short(config)}; an object is needed. Repair the file.")
        configs[layer] = _flatten_params(config, where, findings) if lenient else config
        _check_read_config(configs[layer], where)
    return (configs, findings) if lenient else configs


def merge_header_metadata(texts: Sequence[str]) -> str:
    """One `_quantization_metadata` with the layers of all of them (those of a model's shards), in the order given.

    Nothing is repaired or judged here: parse_header_metadata does that. Raises InputFileError: no JSON object with
    `layers`, or a layer that two of them describe differently.
    """
    merged: Config = {}
    merged_layers: Config = {}
    for text in texts:
        content, layers = _load_header_metadata(text)
        for layer, config in layers.items():
            if not same_json(merged_layers.setdefault(layer, config), config):
                raise InputFileError(
                    f"{layer}: two shards describe it differently in {HEADER_KEY}: "
                    f"{json.dumps(merged_layers[layer])} and {json.dumps(config)}. "
                    "Take all shards from one download."
                )
        merged = {**content, **merged}
    return _dump({**merged, "layers": merged_layers}, HEADER_KEY).decode("utf-8")


def _load_header_metadata(text: str) -> tuple[Config, Config]:
    """The whole object, and its `layers`."""
    try:
        content = load_json_object(text.encode("utf-8"), HEADER_KEY)
    except UnicodeEncodeError as err:
        raise InputFileError(f"{HEADER_KEY} is not valid Unicode text ({err}). Write the file again.") from err
    layers = content.get("layers")
    if not isinstance(layers, dict):
        raise InputFileError(
            f"{HEADER_KEY} has layers = {short(layers)}; an object of layer configs is needed. "
            "Quantize the source again, or repair the file."
        )
    return content, layers


def same_json(one: object, other: object) -> bool:
    """Whether two JSON values are equal, whatever the order of their keys."""
    # Python's == would take `true` for 1.
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _flatten_params(config: Config, where: str, findings: list[str]) -> Config:
    params = config.get("params")
    if not isinstance(params, dict):
        return config
    flat = {key: value for key, value in config.items() if key != "params"}
    for key, value in params.items():
        flat.setdefault(key, value)
    findings.append(
        f"{where} nests {', '.join(params) or 'nothing'} in params; the root is where they belong, "
        "and where they were put."
    )
    return flat


def _dump(content: Mapping[str, object], what: str) -> bytes:
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as err:
        raise RequestError(f"{what} holds text that is not valid Unicode ({err}). Rename it.") from err


def _require_valid(config: Mapping[str, object], where: str) -> None:
    problem = _config_problem(config)
    if problem:
        raise RequestError(f"{where} {problem}. Correct the format's config.")


def _check_read_config(config: Config, where: str) -> None:
    problem = _config_problem(config)
    if problem:
        raise InputFileError(f"{where} {problem}. Repair the file, or quantize the source again.")


def _config_problem(config: Mapping[str, object]) -> str | None:
    """What keeps a config from being a flat JSON object with a format; None if nothing does."""
    name = config.get("format")
    if not isinstance(name, str) or not name:
        return f"has no format: {short(name)} was found, a non-empty string is needed"
    for key, value in config.items():
        if not isinstance(key, str):
            return f"has the key {short(key)}; JSON keys are strings"
        if isinstance(value, dict):
            return f"nests an object in {key!r}; its members belong at the root, where ComfyUI reads them"
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(item, (str, int, float, bool, type(None))):
                return f"has {key!r} = {short(value)}, which is not a plain JSON value or list of them"
            if isinstance(item, float) and not math.isfinite(item):
                return f"has {key!r} = {short(value)}; JSON has no NaN or Infinity"
    return None
