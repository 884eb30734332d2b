"""The trained model as a file of any format, changed as one likes; and what a form of it is, that a tool puts right.

Only its first and its last block are quantized, which keeps two hundred loads short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from comfy_server import ROOT
from comfyui_quantpress.quant_core.checkpoint.metadata import HEADER_KEY, build_header_metadata, encode_config
from comfyui_quantpress.quant_core.checkpoint.source import Source, open_source
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.tools.migrate import migrate
from comfyui_quantpress.quant_core.tools.repair import repair
from comfyui_quantpress.quant_core.tools.rewrite import Rewrite
from safetensors.torch import load_file
from tool_files import save
from torch import Tensor

MODEL = ROOT / "assets/tiny_mmdit_256.safetensors"
PREFIX = "model.diffusion_model."
FIRST = "joint_blocks.0.x_block.attn.qkv"
ODD = "final_layer.linear"  # 64 rows: padded block scales show their order by their shape
QUANTIZED = ("joint_blocks.0.", "joint_blocks.3.", ODD)
KEPT = "t_embedder.mlp.0"
OURS = (
    "float8_e4m3fn_rowwise",
    "float8_e4m3fn_blockwise",
    "float8_e4m3fn_block3d",
    "int8_blockwise",
    "int8_lodewise",
    "bnb_nf4",
    "bnb_fp4",
    "bnb_af4",
)


@dataclass(slots=True)
class File:
    """A file in the making.

    tensors: with the codes. configs: of the quantized layers.
    raw: comfy_quant tensors that are not what configs say; None leaves one out.
    header: the layers in the header, None for no header. beside: {name: text}.
    """

    tensors: dict[str, Tensor]
    configs: dict[str, dict]
    raw: dict[str, Tensor | None] = field(default_factory=dict)
    header: dict[str, dict] | None = None
    meta: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)

    def rename(self, old: str, new: str) -> None:
        """The end of tensors' names, of quantized layers."""
        self.tensors = {
            name[: -len(old)] + new if name.endswith(old) and name[: -len(old)] in self.configs else name: t
            for name, t in self.tensors.items()
        }

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
    return File(
        dict(tensors),
        {layer: dict(config) for layer, config in configs.items()},
        header={layer: dict(config) for layer, config in configs.items()},
    )


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
    """A way in which files of a format differ from the canonical one.

    damage: what makes the format's canonical file this form.
    stock: what ComfyUI 0.29 does with the form itself, before any tool: "same" latents, "fails", or "differs".
    truth: a change of the canonical file that the form cannot express (a rounded scale), for the comparison; None when
    there is none.
    """

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


# What several forms do to a file.
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
