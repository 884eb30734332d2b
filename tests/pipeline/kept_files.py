"""Small models in every form that quantized layers stand in, with layers that a plan keeps, and what ComfyUI reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from comfyui_quantpress.quant_core.checkpoint.metadata import build_header_metadata, encode_config
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.formats import format_of_layer, get_format
from comfyui_quantpress.quant_core.numerics.packing import unswizzle_scales
from comfyui_quantpress.quant_core.tools.bitsandbytes import export_bitsandbytes
from comfyui_quantpress.quant_core.tools.merge import split
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# A plan takes those in the blocks and keeps the others: input, modulation and output layers.
TAKEN = ("blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.mlp.fc2")
KEPT = ("img_in", "time_in.in_layer", "blocks.0.modulation.lin", "final_layer.linear")
SHAPES = dict.fromkeys(TAKEN, (256, 512)) | dict.fromkeys(KEPT, (256, 256))

MARKER = torch.zeros(0).to(torch.float8_e4m3fn)

Tensors = dict[str, Tensor]
Change = Callable[[Tensor], Tensor]


def truth() -> Tensors:
    """The 16-bit model. Its weights are at most 0.2, so that codes without their scale are seen at once."""
    seeded = torch.Generator().manual_seed(4)
    tensors = {}
    for layer, shape in SHAPES.items():
        tensors[f"{layer}.weight"] = (torch.randn(shape, generator=seeded) * 0.03).clamp(-0.2, 0.2).bfloat16()
        tensors[f"{layer}.bias"] = torch.randn(shape[0], generator=seeded).bfloat16()
    return tensors | {"norm.weight": torch.ones(256).bfloat16()}


def quantized(fmt: str, layers: tuple[str, ...] = TAKEN + KEPT) -> tuple[Tensors, dict[str, dict]]:
    """The model with these layers in ComfyUI's form, and their configs."""
    tensors, configs, chosen = truth(), {}, get_format(fmt)
    for layer in layers:
        weight = tensors.pop(f"{layer}.weight")
        tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in chosen.quantize(weight).items()}
        configs[layer] = dict(chosen.config(SHAPES[layer], weight.dtype))
    return tensors, configs


def save(path: Path, tensors: Tensors, configs: dict[str, dict] | None = None, header: bool = True) -> Path:
    described = {f"{layer}.comfy_quant": encode_config(config) for layer, config in (configs or {}).items()}
    metadata = {"_quantization_metadata": build_header_metadata(configs)} if configs and header else {}
    save_file({name: t.contiguous().clone() for name, t in {**tensors, **described}.items()}, path, metadata)
    return path


def renamed(tensors: Tensors, old: str, new: str, change: Change = lambda t: t) -> Tensors:
    return {
        name[: -len(old)] + new if name.endswith(old) else name: change(t) if name.endswith(old) else t
        for name, t in tensors.items()
    }


def legacy(
    path: Path,
    fmt: str = "float8_e4m3fn",
    layers: tuple[str, ...] = TAKEN + KEPT,
    marker: Tensor | None = MARKER,
    change: Change = lambda t: t,
    inputs: bool = False,
    prefix: str = "",
) -> Path:
    tensors = renamed(quantized(fmt, layers)[0], ".weight_scale", ".scale_weight", change)
    if inputs:
        tensors |= {f"{layer}.scale_input": torch.tensor([0.5]) for layer in layers}
    if marker is not None:
        tensors["scaled_fp8"] = marker
    return save(path, {prefix + name: t for name, t in tensors.items()})


def bare(path: Path, fmt: str = "float8_e4m3fn", change: Change = lambda t: t, inputs: bool = False) -> Path:
    tensors = renamed(quantized(fmt)[0], ".weight_scale", ".weight_scale", change)
    if inputs:
        tensors |= {f"{layer}.input_scale": torch.tensor(0.5) for layer in TAKEN + KEPT}
    return save(path, tensors)


def inverse(path: Path) -> Path:
    return save(path, renamed(quantized("float8_e4m3fn_blockwise")[0], ".weight_scale", ".weight_scale_inv"))


def other_name(path: Path) -> Path:
    return save(path, renamed(quantized("float8_e4m3fn")[0], ".weight_scale", ".w_scale"))


def modelopt(path: Path) -> Path:
    tensors = quantized("nvfp4")[0]
    for layer, (n, k) in SHAPES.items():
        weight = tensors[f"{layer}.weight"]
        tensors[f"{layer}.weight"] = (weight << 4) | (weight >> 4)
        tensors[f"{layer}.weight_scale"] = unswizzle_scales(tensors[f"{layer}.weight_scale"], n, k // 16)
    (path.parent / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}}))
    return save(path, tensors)


def older_4bit(path: Path) -> Path:
    tensors, configs = quantized("bnb_nf4")
    return save(path, renamed(tensors, ".weight_scale", ".absmax", lambda t: t.reshape(-1)), configs)


def hybrid(path: Path) -> Path:
    tensors, configs = quantized("mxfp8")
    for layer, config in configs.items():
        config["format"], tensors[f"{layer}.weight_scalar"] = "hybrid_mxfp8", torch.tensor(0.25)
    return save(path, tensors, configs)


def bitsandbytes(path: Path, nested: bool = False) -> Path:
    ours = save(path.with_name("ours.safetensors"), *quantized("bnb_nf4"))
    with open_source(ours) as src:
        export_bitsandbytes(src, nested=nested).apply(path)
    ours.unlink()
    return path


def header_only(path: Path) -> Path:
    tensors, configs = quantized("float8_e4m3fn")
    save_file(tensors, path, {"_quantization_metadata": build_header_metadata(configs)})
    return path


def padded(path: Path) -> Path:
    """The descriptions end in NULs, and the scales have a dimension too many."""
    tensors, configs = quantized("float8_e4m3fn")
    tensors = renamed(tensors, ".weight_scale", ".weight_scale", lambda t: t.reshape(1))
    texts = {layer: torch.cat([encode_config(c), torch.zeros(3, dtype=torch.uint8)]) for layer, c in configs.items()}
    return save(path, tensors | {f"{layer}.comfy_quant": text for layer, text in texts.items()})


def sharded(path: Path) -> Path:
    whole, index = legacy(path.with_name("whole.safetensors")), path.with_suffix(".safetensors.index.json")
    with open_source(whole) as src:
        split(src, index, 300_000)
    whole.unlink()
    return index


PREFIX = "model.diffusion_model."
FORMS: dict[str, Callable[[Path], Path]] = {
    "legacy": legacy,
    "legacy, full precision": lambda path: legacy(path, marker=torch.zeros(2).to(torch.float8_e4m3fn)),
    "legacy, float32 marker": lambda path: legacy(path, marker=torch.zeros(1)),
    "legacy, no marker": lambda path: legacy(path, marker=None),
    "legacy, E5M2": lambda path: legacy(path, "float8_e5m2", marker=torch.zeros(0).to(torch.float8_e5m2)),
    "legacy, row scales": lambda path: legacy(path, "float8_e4m3fn_rowwise"),
    "legacy, one element": lambda path: legacy(path, change=lambda t: t.reshape(1)),
    "legacy, bf16 scales": lambda path: legacy(path, change=lambda t: t.bfloat16()),
    "legacy, input scales": lambda path: legacy(path, inputs=True),
    "legacy, INT8": lambda path: legacy(path, "int8_tensorwise", marker=None),
    "legacy, prefix": lambda path: legacy(path, prefix=PREFIX),
    "legacy, shards": sharded,
    "legacy, some layers": lambda path: legacy(path, layers=(*TAKEN[:2], *KEPT[1:])),
    "bare": bare,
    "bare, input scales": lambda path: bare(path, inputs=True),
    "bare, row scales": lambda path: bare(path, "float8_e4m3fn_rowwise"),
    "bare, one element": lambda path: bare(path, change=lambda t: t.reshape(1)),
    "bare, MXFP8": lambda path: bare(path, "mxfp8"),
    "bare, transformers": inverse,
    "other name": other_name,
    "modelopt": modelopt,
    "comfy 4 bit": older_4bit,
    "hybrid_mxfp8": hybrid,
    "bitsandbytes": bitsandbytes,
    "bitsandbytes, nested": lambda path: bitsandbytes(path, nested=True),
    "header only": header_only,
    "padded": padded,
}


def as_comfyui_reads(path: Path) -> Tensors:
    """{weight: float32} by comfy_quant alone: a weight without a description is taken as it stands."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    weights = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if layer == name:
            continue
        text = tensors.get(f"{layer}.comfy_quant")
        if text is None:
            weights[name] = tensor.to(torch.float32)
            continue
        config = json.loads(text.numpy().tobytes())
        parts = {n.removeprefix(f"{layer}."): t for n, t in tensors.items() if n.startswith(f"{layer}.")}
        shapes = {suffix: tuple(t.shape) for suffix, t in parts.items()}
        fmt = format_of_layer(layer, config, shapes)
        weights[name] = replace(fmt).dequantize(parts, fmt.shape_from(shapes, config))
    return weights
