"""comfy_quant descriptions and headers that are written otherwise, or wrong."""

from __future__ import annotations

import json

import torch
from comfyui_quantpress.quant_core.checkpoint.metadata import HEADER_KEY, build_header_metadata, encode_config
from form import FIRST, KEPT, PREFIX, File, Form, canonical, plain, repairing
from torch import Tensor


def text(content: str | bytes) -> Tensor:
    return torch.frombuffer(bytearray(content if isinstance(content, bytes) else content.encode()), dtype=torch.uint8)


def nested(file: File) -> None:
    for layer, config in file.configs.items():
        rest = dict(config)
        file.raw[layer] = text(json.dumps({"format": rest.pop("format"), "params": rest}))
    file.header = None


def header_only(file: File) -> None:
    file.raw = dict.fromkeys(file.configs)


def extra_keys(file: File) -> None:
    for layer, config in file.configs.items():
        config |= {
            "group_size": 16,
            "orig_dtype": "torch.bfloat16",
            "orig_shape": list(plain()[f"{layer}.weight"].shape),
        }


def nul(file: File) -> None:
    file.raw[FIRST], file.header = text(json.dumps(file.configs[FIRST]).encode() + b"\0\0\0"), None


def invalid_json(file: File) -> None:
    file.raw[FIRST], file.header = text(json.dumps(file.configs[FIRST])[:-3]), None


def signed_config(file: File) -> None:
    file.raw[FIRST], file.header = encode_config(file.configs[FIRST]).view(torch.int8).reshape(1, -1), None


def no_header(file: File) -> None:
    file.header = None


def broken_header(file: File) -> None:
    file.meta[HEADER_KEY] = build_header_metadata(file.configs)[:-4]


def header_lacks_a_layer(file: File) -> None:
    del file.header[FIRST]


def header_with_prefix(file: File) -> None:
    file.header = {PREFIX + layer: config for layer, config in file.header.items()}


def header_names_a_stranger(file: File) -> None:
    file.header["gone"] = {"format": "nvfp4"}


def header_contradicts_the_data(file: File) -> None:
    file.header[FIRST] = {"format": "asym_w4a8_int8", "group_size": 16}


def beside_the_weights(name: str) -> bool:
    return name.rpartition(".")[0] in canonical("nvfp4").configs and not name.endswith((".weight", ".bias"))


def scales_under_a_prefix(file: File) -> None:
    file.tensors = {PREFIX + name if beside_the_weights(name) else name: t for name, t in file.tensors.items()}
    file.raw = {layer: None for layer in file.configs} | {
        PREFIX + layer: encode_config(c) for layer, c in file.configs.items()
    }
    file.header = None


def another_label(file: File) -> None:
    """As converters wrote it that fell back to row scales and kept the label of block scales."""
    file.configs = {layer: {"format": "float8_e4m3fn_blockwise", "group_size": 128} for layer in file.configs}
    file.header = None


def orphan(file: File) -> None:
    file.tensors[f"{KEPT}.weight_scale"] = torch.tensor(1.0)


def described_but_whole(file: File) -> None:
    file.raw[KEPT] = encode_config({"format": "float8_e4m3fn"})


DESCRIPTIONS = [
    Form("params-int8-convrot", "int8_convrot", nested, "same"),
    Form("params-convrot-w4a4", "convrot_w4a4", nested, "same"),
    Form("params-int8-blockwise", "int8_blockwise", nested, "fails"),
    Form("params-nf4", "bnb_nf4", nested, "fails"),
    Form("header-only", "nvfp4", header_only, "same"),
    Form("extra-keys", "nvfp4", extra_keys, "same"),
    Form("nul", "nvfp4", nul, "fails", repairing),
    Form("invalid-json", "nvfp4", invalid_json, "fails", repairing),
    Form("signed-config", "float8_e4m3fn", signed_config, "same", repairing),
    Form("no-header", "nvfp4", no_header, "same", repairing),
    Form("broken-header", "nvfp4", broken_header, "fails", repairing),
    Form("header-lacks-a-layer", "nvfp4", header_lacks_a_layer, "same", repairing),
    Form("header-with-prefix", "nvfp4", header_with_prefix, "fails", repairing),
    Form("header-names-a-stranger", "nvfp4", header_names_a_stranger, "same", repairing),
    Form("header-contradicts-the-data", "nvfp4", header_contradicts_the_data, "fails", repairing),
    Form("scales-under-a-prefix", "nvfp4", scales_under_a_prefix, "fails", repairing),
    Form("another-label", "float8_e4m3fn_rowwise", another_label, "fails", repairing),
    Form("orphan", "float8_e4m3fn", orphan, "same", repairing),
    Form("described-but-whole", "float8_e4m3fn", described_but_whole, "fails", repairing),
]
