"""Baked LoRAs equal what ComfyUI makes of them: every name that it looks a layer up by, all kinds of adapters."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from comfy_server import COMFYUI, PYTHON, missing
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.tools.lora import bake
from safetensors.torch import load_file

HERE = Path(__file__).parent
FAMILIES = list(json.loads((HERE / "lora_models.json").read_text("utf-8")))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if missing():
        pytest.skip(missing())
    folder = tmp_path_factory.mktemp("loras")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([PYTHON, HERE / "lora_script.py", COMFYUI, folder], check=True, timeout=300, env=environment)
    yield folder


def largest_difference(folder: Path, number: int) -> float:
    """Between ComfyUI's weights and ours, relative to the largest number of the tensor."""
    worst = 0.0
    target = folder / "ours.safetensors"
    with open_source(folder / "model.safetensors") as src, open_source(folder / f"lora-{number}.safetensors") as lora:
        bake(src, [(lora, float(lora.metadata["strength"]))]).apply(target, overwrite=True)
    before, theirs, ours = (load_file(folder / f"{name}.safetensors") for name in ("model", f"baked-{number}", "ours"))
    assert theirs and set(theirs) <= set(ours) == set(before)
    for name, tensor in ours.items():
        if name not in theirs:
            assert torch.equal(tensor, before[name]), name
            continue
        assert torch.equal(tensor, before[name]) == torch.equal(theirs[name], before[name]), name
        difference = float((tensor - theirs[name]).abs().max() / theirs[name].abs().max())
        assert difference < 1e-4, f"{name}: {difference}"
        worst = max(worst, difference)
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_that_comfyui_knows_is_baked_as_comfyui_does_it(written, family):
    folder = written / family
    loras = sorted(folder.glob("lora-*.safetensors"))
    assert loras
    assert max(largest_difference(folder, number) for number in range(len(loras))) < 2e-6
