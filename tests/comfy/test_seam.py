"""The seam on ComfyUI's own classes: seam_script.py's checks, each in a process of its own with ComfyUI's Python."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from comfy_server import COMFYUI, PYTHON, ROOT, Graph, missing

SCRIPT = Path(__file__).with_name("seam_script.py")
CHECKS = re.findall(r"^def (\w+)\(\):", SCRIPT.read_text("utf-8"), re.MULTILINE)
NOT_CHECKS = {"load_pack", "every_format"}  # without arguments, like the checks
NEED_A_FILE = {
    "a_partly_loaded_model_gives_the_same_latents_as_a_whole_one",
    "checkpoint_save_keeps_every_bit_of_our_layers",
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}


def run(check: str, *files: Path) -> None:
    if missing():
        pytest.skip(missing())
    done = subprocess.run(
        [PYTHON, SCRIPT, COMFYUI, ROOT, check, *files],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **ENVIRONMENT},
        cwd=SCRIPT.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in NOT_CHECKS | NEED_A_FILE])
def test_seam(check):
    run(check)


def test_checkpoint_save_keeps_every_bit_of_our_layers(server):
    graph, formats = Graph(), ("bnb_nf4", "int8_blockwise", "float8_e4m3fn_rowwise", "nvfp4")
    for fmt in formats:
        node = graph.quantize(graph.source("trained_sd3"), format=fmt)
        graph.add(
            "QuantPressSave", quantized=(node, 0), folder="diffusion_models", name=f"checkpoint-{fmt}", overwrite=True
        )
    server.run(graph)
    run(
        "checkpoint_save_keeps_every_bit_of_our_layers",
        ROOT / "assets/tiny_taesd.safetensors",
        *(server.base / f"models/diffusion_models/checkpoint-{fmt}.safetensors" for fmt in formats),
    )


def test_a_partly_loaded_model_gives_the_same_latents_as_a_whole_one(server):
    graph, formats = (
        Graph(),
        ("bnb_nf4", "int8_blockwise", "int8_lodewise", "float8_e4m3fn_rowwise", "float8_e4m3fn_block3d"),
    )
    for fmt in formats:
        node = graph.quantize(graph.source("trained_sd3"), format=fmt)
        graph.add(
            "QuantPressSave", quantized=(node, 0), folder="diffusion_models", name=f"lowvram-{fmt}", overwrite=True
        )
    server.run(graph)
    run(
        "a_partly_loaded_model_gives_the_same_latents_as_a_whole_one",
        *(server.base / f"models/diffusion_models/lowvram-{fmt}.safetensors" for fmt in formats),
    )
