"""Legacy fp8_scaled and INT8 files, and the tools' changes of files that are sound."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfyui_quantpress.quant_core.checkpoint.source import Source
from comfyui_quantpress.quant_core.tools.cleanup import add_legacy_input, cleanup_legacy
from comfyui_quantpress.quant_core.tools.configs import HeaderMode
from comfyui_quantpress.quant_core.tools.edit import Edit, edit
from comfyui_quantpress.quant_core.tools.migrate import MigrateOptions, migrate
from comfyui_quantpress.quant_core.tools.rewrite import Rewrite
from comfyui_quantpress.quant_core.tools.to_legacy import to_legacy
from form import KEPT, PREFIX, File, Form, bf16, one, rounded_scales, with_inputs
from torch import Tensor


def legacy(
    shape: Callable[[Tensor], Tensor] = lambda t: t,
    marker: int | None = 0,
    inputs: bool = False,
    prefix: str = "",
    dummy: bool = False,
) -> Callable[[File], None]:
    """scale_weight in place of weight_scale, of another rank; inputs: some scale_input of 1.0 and of 0.5."""

    def damage(file: File) -> None:
        file.undescribed()
        for layer in file.configs:
            file.tensors.pop(f"{layer}.input_scale", None)
        file.change("weight_scale", shape)
        file.rename(".weight_scale", ".scale_weight")
        if inputs:
            file.tensors |= {
                f"{layer}.scale_input": torch.tensor([1.0 if "mlp" in layer else 0.5]) for layer in file.configs
            }
        if dummy:
            file.tensors |= {f"{KEPT}.scale_weight": torch.ones(()), f"{KEPT}.scale_input": torch.ones(())}
        if marker is not None:
            file.tensors["scaled_fp8"] = torch.zeros(marker).to(torch.float8_e4m3fn)
        file.tensors = {prefix + name: t for name, t in file.tensors.items()}
        file.configs = {prefix + layer: config for layer, config in file.configs.items()}
        file.undescribed()

    return damage


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
    Form(
        "legacy-cleanup",
        "float8_e4m3fn",
        legacy(one, 0, inputs=True),
        "same",
        lambda src: cleanup_legacy(src, marker=2),
        truth=with_inputs,
    ),
    Form(
        "legacy-cleanup-dummies",
        "float8_e4m3fn",
        legacy(one, 1, dummy=True),
        "differs",
        lambda src: cleanup_legacy(src, scale_input=True),
    ),
    Form("legacy-input", "float8_e4m3fn", legacy(), "same", add_legacy_input),
    Form(
        "migrate-full-precision",
        "float8_e4m3fn",
        legacy(),
        "same",
        lambda src: migrate(src, MigrateOptions(full_precision_matrix_mult=True, header=False)),
    ),
]
