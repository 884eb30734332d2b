"""Runs load_script.py in ComfyUI's Python, for lists of files, and gives the latents back."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_server import COMFYUI, PYTHON, ROOT, relative_error
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).with_name("load_script.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the jobs gave.

    latents: by job id, and velocities under "<id>/velocities". known: {"quantized", "layouts"} of each, or {"error"}.
    """

    latents: dict[str, Tensor]
    known: dict[str, dict[str, Any]]

    def error(self, job: str) -> str | None:
        return self.known[job].get("error")

    def difference(self, one: str, other: str) -> float:
        """Relative; 0.0 means bit-identical. AssertionError, with the loader's words, when one did not load."""
        for job in (one, other):
            assert self.error(job.removesuffix("/velocities")) is None, f"{job}: {self.error(job)}"
        x, y = self.latents[one], self.latents[other]
        assert bool(y.isfinite().all()) and float(y.norm()) > 0, other
        return 0.0 if bool((x == y).all()) else relative_error(x.double(), y.double())


@dataclass(slots=True)
class Loading:
    process: subprocess.Popen[bytes]
    log: Path
    out: Path

    def result(self) -> Loaded:
        code = self.process.wait(300)
        assert code == 0, self.log.read_text("utf-8", errors="replace")[-3000:]
        return Loaded(load_file(self.out), json.loads(self.out.with_name(self.out.name + ".json").read_text("utf-8")))


def start(
    name: str, folder: Path, jobs: Iterable[dict[str, Any]], *, pack: bool = False, fp8: bool = False
) -> Loading:
    """A process that loads and samples the jobs; see load_script.py. pack: with ours in its ComfyUI."""
    out, order, log = folder / f"{name}.safetensors", folder / f"{name}.jobs.json", folder / f"{name}.log"
    order.write_text(
        json.dumps(
            {
                "out": str(out),
                "pack": str(ROOT) if pack else None,
                "fp8": fp8,
                "jobs": list(jobs),
                "conditioning": str(ROOT / "assets/conditioning.safetensors"),
            },
            default=str,
        ),
        "utf-8",
    )
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [PYTHON, SCRIPT, COMFYUI, order],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT},
            cwd=SCRIPT.parent,
        )
    return Loading(process, log, out)
