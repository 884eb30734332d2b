"""The trained model in every legacy or broken form that the tools claim to read, and the tool that puts each right.

Only its first and its last block are quantized, which keeps two hundred loads short.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from comfy_server import ROOT
from safetensors.torch import load_file
from torch import Tensor

from comfyui_quantpress.quant_core.checkpoint.metadata import HEADER_KEY, build_header_metadata, encode_config
from comfyui_quantpress.quant_core.checkpoint.source import Source, open_source
from comfyui_quantpress.quant_core.format import get_format
from comfyui_quantpress.quant_core.packing import unswizzle_scales
from comfyui_quantpress.quant_core.tools.cleanup import add_legacy_input, cleanup_legacy
from comfyui_quantpress.quant_core.tools.edit import Edit, edit
from comfyui_quantpress.quant_core.tools.configs import HeaderMode
from comfyui_quantpress.quant_core.tools.migrate import MigrateOptions, migrate
from comfyui_quantpress.quant_core.tools.repair import repair
from comfyui_quantpress.quant_core.tools.rewrite import Rewrite
from comfyui_quantpress.quant_core.tools.to_legacy import to_legacy
from tool_files import save

MODEL = ROOT / "assets/tiny_mmdit_256.safetensors"
PREFIX = "model.diffusion_model."
FIRST = "joint_blocks.0.x_block.attn.qkv"
ODD = "final_layer.linear"              # 64 rows: padded block scales show their order by their shape
QUANTIZED = ("joint_blocks.0.", "joint_blocks.3.", ODD)
KEPT = "t_embedder.mlp.0"
OURS = ("float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise", "float8_e4m3fn_block3d", "int8_blockwise", "int8_lodewise", "bnb_nf4",
        "bnb_fp4", "bnb_af4")


@dataclass(slots=True)
class File:
    """A file in the making. tensors: with the codes. configs: of the quantized layers. raw: comfy_quant tensors that are not
    what configs say; None leaves one out. header: the layers in the header, None for no header. beside: {name: text}."""

    tensors: dict[str, Tensor]
    configs: dict[str, dict]
    raw: dict[str, Tensor | None] = field(default_factory=dict)
    header: dict[str, dict] | None = None
    meta: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)

    def rename(self, old: str, new: str) -> None:
        """The end of tensors' names, of quantized layers."""
        self.tensors = {name[:-len(old)] + new if name.endswith(old) and name[:-len(old)] in self.configs else name: t
                        for name, t in self.tensors.items()}

    def change(self, suffix: str, to: Callable[[Tensor], Tensor], layers: list[str] | None = None) -> None:
        for layer in layers or self.configs:
            self.tensors[f"{layer}.{suffix}"] = to(self.tensors[f"{layer}.{suffix}"])

    def undescribed(self) -> None:
        self.raw, self.header = dict.fromkeys(self.configs), None

    def write(self, path: Path) -> Path:
        written = {layer: encode_config(config) for layer, config in self.configs.items()} | self.raw
        tensors = {**self.tensors, **{f"{layer}.comfy_quant": t for layer, t in written.items() if t is not None}}
        header = {} if self.header is None else {HEADER_KEY: build_header_metadata(self.header)}
        for name, text in self.beside.items():
            (path.parent / name).write_text(text, encoding="utf-8")
        return save(path, tensors, metadata={**header, **self.meta})


@cache
def plain() -> dict[str, Tensor]:
    return load_file(MODEL)


@cache
def _quantized(name: str) -> tuple[dict[str, Tensor], dict[str, dict]]:
    fmt, tensors, configs = get_format(name), {}, {}
    for key, w in plain().items():
        layer = key.removesuffix(".weight")
        if w.dim() == 2 and layer.startswith(QUANTIZED) and fmt.problem(tuple(w.shape)) is None:
            tensors |= {f"{layer}.{suffix}": t for suffix, t in fmt.quantize(w).items()}
            configs[layer] = fmt.config(tuple(w.shape), w.dtype)
        else:
            tensors[key] = w
    return tensors, configs


def canonical(name: str) -> File:
    tensors, configs = _quantized(name)
    return File(dict(tensors), {layer: dict(config) for layer, config in configs.items()},
                header={layer: dict(config) for layer, config in configs.items()})


def decoded(name: str) -> dict[str, Tensor]:
    """The model with the format's own error, in float32, for loaders that know no formats."""
    fmt, (tensors, configs) = get_format(name), _quantized(name)
    result = {key: t for key, t in tensors.items() if key.rpartition(".")[0] not in configs or key.endswith(".bias")}
    for layer in configs:
        parts = {key.removeprefix(layer + "."): t for key, t in tensors.items() if key.rpartition(".")[0] == layer}
        result[f"{layer}.weight"] = fmt.dequantize(parts, tuple(plain()[f"{layer}.weight"].shape))
    return result


def migrating(src: Source) -> Rewrite:
    return migrate(src)


def repairing(src: Source) -> Rewrite:
    return repair(src).rewrite


@dataclass(frozen=True, slots=True)
class Form:
    """damage: what makes the format's canonical file this form. stock: what ComfyUI 0.29 does with the form itself, before any
    tool: "same" latents, "fails", or "differs". truth: a change of the canonical file that the form cannot express (a rounded
    scale), for the comparison; None when there is none."""

    name: str
    format: str
    damage: Callable[[File], None]
    stock: str
    tool: Callable[[Source], Rewrite] = migrating
    truth: Callable[[File], None] | None = None

    @property
    def ours(self) -> bool:
        return self.format in OURS

    def write(self, folder: Path) -> tuple[Path, Path]:
        """(the form, what the tool makes of it), each in a folder of its own."""
        source, target = folder / self.name / "before.safetensors", folder / self.name / "after.safetensors"
        source.parent.mkdir()
        file = canonical(self.format)
        self.damage(file)
        file.write(source)
        with open_source(source) as src:
            self.tool(src).apply(target)
        for name in file.beside:
            (source.parent / name).unlink()
        return source, target


# ---- legacy fp8_scaled and INT8 ---------------------------------------------------------------------------------------
def legacy(shape: Callable[[Tensor], Tensor] = lambda t: t, marker: int | None = 0, inputs: bool = False, prefix: str = "",
           dummy: bool = False) -> Callable[[File], None]:
    """scale_weight in place of weight_scale, of another rank; inputs: some scale_input of 1.0 and of 0.5."""
    def damage(file: File) -> None:
        file.undescribed()
        for layer in file.configs:
            file.tensors.pop(f"{layer}.input_scale", None)
        file.change("weight_scale", shape)
        file.rename(".weight_scale", ".scale_weight")
        if inputs:
            file.tensors |= {f"{layer}.scale_input": torch.tensor([1.0 if "mlp" in layer else 0.5]) for layer in file.configs}
        if dummy:
            file.tensors |= {f"{KEPT}.scale_weight": torch.ones(()), f"{KEPT}.scale_input": torch.ones(())}
        if marker is not None:
            file.tensors["scaled_fp8"] = torch.zeros(marker).to(torch.float8_e4m3fn)
        file.tensors = {prefix + name: t for name, t in file.tensors.items()}
        file.configs = {prefix + layer: config for layer, config in file.configs.items()}
        file.undescribed()
    return damage


def one(t: Tensor) -> Tensor:
    return t.reshape(1)


def bf16(t: Tensor) -> Tensor:
    return t.bfloat16()


def rounded_scales(file: File) -> None:
    file.change("weight_scale", lambda t: t.bfloat16().float())


def rounded_second_scales(file: File) -> None:
    file.change("weight_scale_2", lambda t: t.bfloat16().float())


def with_inputs(file: File) -> None:
    file.tensors |= {f"{layer}.input_scale": torch.tensor(1.0 if "mlp" in layer else 0.5) for layer in file.configs}


# A CPU decodes fp8 weights, so that the column of scales happens to broadcast; fp8 matrix units take one scale only.
LEGACY = [
    Form("legacy-fp8", "float8_e4m3fn", legacy(), "same"),
    Form("legacy-fp8-marker-2-one-element", "float8_e4m3fn", legacy(one, 2), "same"),
    Form("legacy-fp8-marker-1-two-dims", "float8_e4m3fn", legacy(lambda t: t.reshape(1, 1), 1), "same"),
    Form("legacy-fp8-scale-input", "float8_e4m3fn", legacy(inputs=True), "same", truth=with_inputs),
    Form("legacy-fp8-without-marker", "float8_e4m3fn", legacy(marker=None), "differs"),
    Form("legacy-fp8-dummy-scales", "float8_e4m3fn", legacy(dummy=True), "differs"),
    Form("legacy-fp8-prefix", "float8_e4m3fn", legacy(prefix=PREFIX), "same"),
    Form("legacy-fp8-bf16-scales", "float8_e4m3fn", legacy(bf16), "same", truth=rounded_scales),
    Form("legacy-fp8-e5m2", "float8_e5m2", legacy(), "differs"),
    Form("legacy-fp8-rows", "float8_e4m3fn_rowwise", legacy(), "fails"),
    Form("legacy-fp8-rows-column", "float8_e4m3fn_rowwise", legacy(lambda t: t[:, None]), "same"),
    Form("legacy-fp8-blocks", "float8_e4m3fn_blockwise", legacy(), "fails"),
    Form("legacy-fp8-block3d", "float8_e4m3fn_block3d", legacy(), "fails"),
    Form("legacy-int8", "int8_tensorwise", legacy(marker=None), "differs"),
    Form("legacy-int8-rows", "int8_rowwise", legacy(), "differs"),
    Form("legacy-int8-rows-flat", "int8_rowwise", legacy(lambda t: t[:, 0]), "fails"),
    Form("legacy-int8-blockwise", "int8_blockwise", legacy(), "fails"),
    Form("legacy-int8-lodewise", "int8_lodewise", legacy(), "fails"),
]


# ---- comfy_quant, written otherwise ------------------------------------------------------------------------------------
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
        config |= {"group_size": 16, "orig_dtype": "torch.bfloat16", "orig_shape": list(plain()[f"{layer}.weight"].shape)}


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
    file.raw = {layer: None for layer in file.configs} | {PREFIX + layer: encode_config(c) for layer, c in file.configs.items()}
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


# ---- scales of another dtype, rank or order; no description -----------------------------------------------------------
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
    file.configs = {layer: {**config, "format": "hybrid_mxfp8", "group_size": 32} for layer, config in file.configs.items()}
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
    Form("int8-blockwise-bf16-scales", "int8_blockwise", scale("weight_scale", bf16), "fails", repairing, rounded_scales),
    Form("int8-undescribed", "int8_tensorwise", File.undescribed, "differs"),
    Form("int8-rows-undescribed", "int8_rowwise", File.undescribed, "differs", assuming("int8_rowwise")),
    Form("int8-convrot-undescribed", "int8_convrot", File.undescribed, "differs", assuming("int8_convrot")),
]


# ---- other families ---------------------------------------------------------------------------------------------------
def modelopt_fp8(file: File) -> None:
    with_inputs(file)
    file.undescribed()
    file.beside["hf_quant_config.json"] = json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}})


def modelopt_nvfp4(file: File) -> None:
    """The even column in the low nibble, and scales in row order; the JSON beside the file says who wrote it."""
    row_order(16)(file)
    file.change("weight", lambda t: (t << 4) | (t >> 4))
    file.undescribed()
    file.beside["hf_quant_config.json"] = json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}})


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


FAMILIES = [
    Form("modelopt-fp8", "float8_e4m3fn", modelopt_fp8, "differs", truth=with_inputs),
    Form("modelopt-nvfp4", "nvfp4", modelopt_nvfp4, "fails"),
    Form("modelopt-nvfp4-told", "nvfp4", lambda file: (modelopt_nvfp4(file), file.beside.clear()), "fails", assuming("modelopt")),
    Form("transformers-fp8-blocks", "float8_e4m3fn_blockwise", transformers, "differs"),
    *(Form(f"older-comfy-{kind}", f"bnb_{kind}", older_comfy(kind), "fails") for kind in ("nf4", "fp4", "af4")),
]


# ---- tools that change what is sound ----------------------------------------------------------------------------------
def sound(file: File) -> None:
    """Nothing is wrong with it."""


def editing(**options: object) -> Callable[[Source], Rewrite]:
    return lambda src: edit(src, Edit(**options))


EDITS = [
    Form("edit-full-precision", "float8_e4m3fn", sound, "same", editing(add={"full_precision_matrix_mult": True})),
    Form("edit-note", "nvfp4", sound, "same", editing(add={"note": "✓"}, layers="attn")),
    Form("edit-drop-header", "nvfp4", sound, "same", editing(header=HeaderMode.DROP)),
    Form("edit-ours", "bnb_nf4", sound, "fails", editing(add={"note": "✓"}, header=HeaderMode.BUILD)),
    Form("to-legacy", "float8_e4m3fn", sound, "same", to_legacy),
    Form("legacy-cleanup", "float8_e4m3fn", legacy(one, 0, inputs=True), "same", lambda src: cleanup_legacy(src, marker=2),
         truth=with_inputs),
    Form("legacy-cleanup-dummies", "float8_e4m3fn", legacy(one, 1, dummy=True), "differs",
         lambda src: cleanup_legacy(src, scale_input=True)),
    Form("legacy-input", "float8_e4m3fn", legacy(), "same", add_legacy_input),
    Form("migrate-full-precision", "float8_e4m3fn", legacy(), "same",
         lambda src: migrate(src, MigrateOptions(full_precision_matrix_mult=True, header=False))),
]

FORMS = [*LEGACY, *DESCRIPTIONS, *SCALES, *FAMILIES, *EDITS]
