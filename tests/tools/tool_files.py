"""Small checkpoint files in every form that the tools read, for the tests of the tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from comfyui_quantpress.quant_core.checkpoint.metadata import build_header_metadata, encode_config
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.formats.base import Format
from comfyui_quantpress.quant_core.stored.layers import stored_layers
from safetensors.torch import save_file
from torch import Tensor

N, K = 256, 256


def weight(seed: int, n: int = N, k: int = K) -> Tensor:
    rows = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed + 77)) + 0.1
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05 * rows).bfloat16()


def bystanders(prefix: str = "") -> dict[str, Tensor]:
    """What no tool may touch: a bias, a norm, a 16-bit weight, an odd dtype, an empty tensor."""
    seeded = torch.Generator().manual_seed(5)
    return {
        f"{prefix}blocks.0.bias": torch.randn(N, generator=seeded),
        f"{prefix}norm.weight": torch.randn(7, generator=seeded).half(),
        f"{prefix}final.weight": weight(9, 32, 64),
        f"{prefix}ids": torch.arange(5),
        f"{prefix}nothing": torch.empty(0, 3),
    }


def quantized(fmt: Format, layers: tuple[str, ...] = ("blocks.0", "blocks.1"), **extra: Any) -> tuple[dict, dict]:
    """({tensor name: tensor}, {layer: config}) of canonical layers."""
    tensors, configs = {}, {}
    for i, layer in enumerate(layers):
        w = weight(i)
        tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in fmt.quantize(w).items()}
        configs[layer] = {**fmt.config(tuple(w.shape), w.dtype), **extra}
    return tensors, configs


def save(
    path: Path,
    tensors: dict[str, Tensor],
    configs: dict[str, dict] | None = None,
    *,
    header: bool = True,
    metadata: dict[str, str] | None = None,
) -> Path:
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"keep": "me ✓", "format": "pt", **(metadata or {})}
    for layer, config in (configs or {}).items():
        tensors[f"{layer}.comfy_quant"] = encode_config(config)
    if configs and header:
        metadata["_quantization_metadata"] = build_header_metadata(configs)
    save_file(tensors, path, metadata)
    return path


def canonical_file(path: Path, name: str = "float8_e4m3fn", header: bool = True, **extra: Any) -> Path:
    tensors, configs = quantized(get_format(name), **extra)
    return save(path, {**tensors, **bystanders()}, configs, header=header)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def decoded(path: Path) -> dict[str, Tensor]:
    with open_source(path) as src:
        return {layer: entry.decode(src) for layer, entry in stored_layers(src).items()}


def config_of(path: Path, layer: str) -> dict:
    with open_source(path) as src:
        return json.loads(src.read(f"{layer}.comfy_quant").numpy().tobytes())


def assert_untouched(
    before: Path,
    after: Path,
    touched: set[str] = frozenset(),
    header: set[str] = frozenset({"_quantization_metadata"}),
) -> None:
    """Tensors and header entries outside of `touched` and `header` are there, with the same dtype, shape and bytes."""
    with open_source(before) as one, open_source(after) as two:
        checked = 0
        for name, info in one.tensors.items():
            if name in touched:
                continue
            assert name in two.tensors, name
            other = two.tensors[name]
            assert (info.dtype, info.shape) == (other.dtype, other.shape), name
            assert torch.equal(one.read_bytes(name), two.read_bytes(name)), name
            checked += 1
        assert checked >= 5
        for key, value in one.metadata.items():
            if key not in header:
                assert two.metadata[key] == value, key
