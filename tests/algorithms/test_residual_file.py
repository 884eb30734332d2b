"""The residual LoRA's file: the names that ComfyUI looks up, what it says of itself, and what the command prints."""

from pathlib import Path

import torch
from comfyui_quantpress.cli.main import main
from comfyui_quantpress.quant_core.algorithms.residual import HOW_TO_LOAD, Residual, save_residuals
from safetensors import safe_open

MODEL = Path(__file__).resolve().parents[2] / "assets/tiny_mmdit_256.safetensors"


def test_the_file_says_how_to_load_it_and_has_comfyuis_names(tmp_path):
    one, two = (Residual(torch.ones(8, 2).bfloat16(), torch.ones(2, 4).bfloat16(), 0.1, 0.05) for _ in range(2))
    save_residuals(
        tmp_path / "r.safetensors", {"model.diffusion_model.blocks.0": one, "blocks.1": two}, {"format": "pt"}
    )
    with safe_open(tmp_path / "r.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.usage_hint": HOW_TO_LOAD}
        assert set(file.keys()) == {
            f"diffusion_model.blocks.{i}.lora_{side}.weight" for i in (0, 1) for side in ("up", "down")
        }


def test_the_command_says_how_to_load_it(tmp_path, capsys):
    lora = tmp_path / "residual.safetensors"
    assert (
        main(
            [
                "quantize",
                str(MODEL),
                str(tmp_path / "m.safetensors"),
                "--format",
                "nvfp4",
                "--only",
                "blocks.0.x_block.attn.qkv",
                "--residual-lora",
                str(lora),
                "--residual-rank",
                "2",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert f"{lora}: {HOW_TO_LOAD}" in capsys.readouterr().out and lora.exists()
