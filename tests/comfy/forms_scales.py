"""Scales of another dtype, rank or order, and files without any description."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfyui_quantpress.quant_core.checkpoint.source import Source
from comfyui_quantpress.quant_core.numerics.packing import unswizzle_scales
from comfyui_quantpress.quant_core.tools.repair import repair
from comfyui_quantpress.quant_core.tools.rewrite import Rewrite
from form import ODD, File, Form, bf16, one, plain, repairing, rounded_scales, rounded_second_scales
from torch import Tensor


def as_bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


def row_order(columns: int, layers: list[str] | None = None) -> Callable[[File], None]:
    def damage(file: File) -> None:
        for layer in layers or file.configs:
            n, k = plain()[f"{layer}.weight"].shape
            file.change("weight_scale", lambda t, n=n, k=k: unswizzle_scales(t, n, k // columns), [layer])

    return damage


def scale(suffix: str, to: Callable[[Tensor], Tensor]) -> Callable[[File], None]:
    return lambda file: file.change(suffix, to)


def unswizzled(src: Source) -> Rewrite:
    return repair(src, unswizzled=True).rewrite


def assuming(name: str, **options: bool) -> Callable[[Source], Rewrite]:
    return lambda src: repair(src, assume=name, **options).rewrite


def hybrid(file: File) -> None:
    file.configs = {
        layer: {**config, "format": "hybrid_mxfp8", "group_size": 32} for layer, config in file.configs.items()
    }
    file.tensors |= {f"{layer}.weight_scalar": torch.tensor(0.25) for layer in file.configs}
    file.header = None


def e8m0(t: Tensor) -> Tensor:
    return t.view(torch.float8_e8m0fnu)


SCALES = [
    Form("nvfp4-byte-scales", "nvfp4", scale("weight_scale", as_bytes), "same", repairing),
    Form("nvfp4-one-element", "nvfp4", scale("weight_scale_2", one), "same", repairing),
    Form("nvfp4-bf16-second-scale", "nvfp4", scale("weight_scale_2", bf16), "same", repairing, rounded_second_scales),
    Form("nvfp4-one-layer-in-row-order", "nvfp4", row_order(16, [ODD]), "fails", repairing),
    Form("nvfp4-all-in-row-order", "nvfp4", row_order(16), "fails", unswizzled),
    Form("nvfp4-undescribed", "nvfp4", File.undescribed, "fails", assuming("nvfp4")),
    Form("mxfp8-e8m0", "mxfp8", scale("weight_scale", e8m0), "same", repairing),
    Form("mxfp8-hybrid", "mxfp8", hybrid, "fails"),
    Form("mxfp8-all-in-row-order", "mxfp8", row_order(32), "fails", unswizzled),
    Form("mxfp8-undescribed", "mxfp8", File.undescribed, "differs"),
    Form("fp8-bf16-scales", "float8_e4m3fn", scale("weight_scale", bf16), "same", repairing, rounded_scales),
    Form("fp8-one-element", "float8_e4m3fn", scale("weight_scale", one), "same", repairing),
    Form("fp8-undescribed", "float8_e4m3fn", File.undescribed, "differs"),
    Form("fp8-rows-undescribed", "float8_e4m3fn_rowwise", File.undescribed, "differs"),
    Form(
        "int8-blockwise-bf16-scales", "int8_blockwise", scale("weight_scale", bf16), "fails", repairing, rounded_scales
    ),
    Form("int8-undescribed", "int8_tensorwise", File.undescribed, "differs"),
    Form("int8-rows-undescribed", "int8_rowwise", File.undescribed, "differs", assuming("int8_rowwise")),
    Form("int8-convrot-undescribed", "int8_convrot", File.undescribed, "differs", assuming("int8_convrot")),
]
