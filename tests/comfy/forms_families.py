"""The files of other tools: ModelOpt, transformers, older ComfyUI, bitsandbytes itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

from comfyui_quantpress.quant_core.formats import get_format
from form import File, Form, plain, with_inputs
from forms_scales import assuming, row_order
from torch import Tensor


def modelopt_fp8(file: File) -> None:
    with_inputs(file)
    file.undescribed()
    file.beside["hf_quant_config.json"] = json.dumps(
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    )


def modelopt_nvfp4(file: File) -> None:
    """The even column in the low nibble, and scales in row order; the JSON beside the file says who wrote it."""
    row_order(16)(file)
    file.change("weight", lambda t: (t << 4) | (t >> 4))
    file.undescribed()
    file.beside["hf_quant_config.json"] = json.dumps(
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    )


def transformers(file: File) -> None:
    file.undescribed()
    file.rename(".weight_scale", ".weight_scale_inv")


def older_comfy(quant_type: str) -> Callable[[File], None]:
    """absmax beside the layer, the codes flat, the codebook in the JSON."""

    def damage(file: File) -> None:
        file.change("weight", lambda t: t.reshape(-1, 1))
        file.change("weight_scale", lambda t: t.reshape(-1))
        file.rename(".weight_scale", ".absmax")
        book = get_format(f"bnb_{quant_type}").codebook().tolist()
        for layer, config in file.configs.items():
            del file.tensors[f"{layer}.weight_codebook"]
            config["quant_map"] = book
        file.header = None

    return damage


@cache
def by_the_library(kind: str, nested_absmax: bool, layer: str) -> tuple[Tensor, object]:
    """(codes, QuantState) of bitsandbytes itself."""
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(plain()[f"{layer}.weight"], blocksize=64, quant_type=kind, compress_statistics=nested_absmax)


def bitsandbytes(kind: str, nested_absmax: bool, beside: bool) -> Callable[[File], None]:
    """As the library saves layers; beside: its tensors are called after the layer, not after the weight."""

    def damage(file: File) -> None:
        for layer in file.configs:
            packed, state = by_the_library(kind, nested_absmax, layer)
            del file.tensors[f"{layer}.weight_scale"], file.tensors[f"{layer}.weight_codebook"]
            file.tensors[f"{layer}.weight"] = packed
            owner = layer if beside else f"{layer}.weight"
            file.tensors |= {f"{owner}.{key}": t for key, t in state.as_dict(packed=True).items()}
        file.undescribed()

    return damage


def decoded_by_the_library(kind: str, nested_absmax: bool) -> Callable[[File], None]:
    def truth(file: File) -> None:
        from bitsandbytes.functional import dequantize_blockwise

        for layer in file.configs:
            packed, state = by_the_library(kind, nested_absmax, layer)
            absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if nested_absmax else state.absmax
            n, k = plain()[f"{layer}.weight"].shape
            file.tensors |= {
                f"{layer}.weight": packed.reshape(n, k // 2),
                f"{layer}.weight_scale": absmax.float().reshape(n, k // 64),
            }

    return truth


LIBRARY = [
    Form(
        f"bitsandbytes-{kind}{'-nested' * nested_absmax}{'-beside' * beside}",
        f"bnb_{kind}",
        bitsandbytes(kind, nested_absmax, beside),
        "fails",
        truth=decoded_by_the_library(kind, nested_absmax),
    )
    for kind, nested_absmax, beside in (
        ("nf4", False, False),
        ("nf4", True, False),
        ("fp4", False, True),
        ("fp4", True, True),
    )
    if find_spec("bitsandbytes")
]
FAMILIES = [
    Form("modelopt-fp8", "float8_e4m3fn", modelopt_fp8, "differs", truth=with_inputs),
    Form("modelopt-nvfp4", "nvfp4", modelopt_nvfp4, "fails"),
    Form(
        "modelopt-nvfp4-told",
        "nvfp4",
        lambda file: (modelopt_nvfp4(file), file.beside.clear()),
        "fails",
        assuming("modelopt"),
    ),
    Form("transformers-fp8-blocks", "float8_e4m3fn_blockwise", transformers, "differs"),
    *(Form(f"older-comfy-{kind}", f"bnb_{kind}", older_comfy(kind), "fails") for kind in ("nf4", "fp4", "af4")),
]
