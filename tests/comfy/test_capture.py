"""The capture on ComfyUI's own samplers: capture_script.py's checks, each in its own process with ComfyUI's Python."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from comfy_server import COMFYUI, PYTHON, ROOT, missing

SCRIPT = Path(__file__).with_name("capture_script.py")
CHECKS = re.findall(r"^def (\w+)\(\):", SCRIPT.read_text("utf-8").partition("def the_loader")[2], re.MULTILINE)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("check", ["the_loader_leaves_room_for_the_record", *CHECKS])
def test_capture(check, models):
    if missing():
        pytest.skip(missing())
    done = subprocess.run(
        [PYTHON, SCRIPT, COMFYUI, ROOT, check, models / "trained_sd3.safetensors"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **ENVIRONMENT},
        cwd=SCRIPT.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
