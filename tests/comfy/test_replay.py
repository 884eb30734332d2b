"""Recorded calls and their replay in ComfyUI: replay_script.py's checks, run with ComfyUI's Python."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from comfy_server import COMFYUI, PYTHON, ROOT

SCRIPT = Path(__file__).with_name("replay_script.py")
CHECKS = re.findall(r"^def (check_\w+)\(\):", SCRIPT.read_text("utf-8"), re.MULTILINE)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def done(models):
    """All checks in one process: importing ComfyUI takes longer than most of them."""
    return subprocess.run(
        [PYTHON, SCRIPT, COMFYUI, ROOT, models, *CHECKS],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **ENVIRONMENT},
        cwd=SCRIPT.parent,
    )


@pytest.mark.parametrize("check", CHECKS)
def test_replay(check, done):
    assert f"passed {check}\n" in done.stdout, done.stderr[-3000:]
