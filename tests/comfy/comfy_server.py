"""A real ComfyUI server for tests, and graphs for it. Standard library only, besides safetensors for latents."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_DIR", Path.home() / "ComfyUI"))
PYTHON = Path(os.environ.get("COMFYUI_PYTHON", COMFYUI / ".venv/bin/python"))
ARGUMENTS = os.environ.get("COMFYUI_ARGS", "--cpu").split()  # e.g. "" for the GPU
START_S, RUN_S = 180, 300


def missing() -> str | None:
    """Why no ComfyUI can be started here; None when one can."""
    if not (COMFYUI / "main.py").is_file():
        return f"no ComfyUI in {COMFYUI} (set COMFYUI_DIR)"
    return None if PYTHON.is_file() else f"no Python with ComfyUI's requirements at {PYTHON} (set COMFYUI_PYTHON)"


class WorkflowError(Exception):
    """node: the class of the node that failed, "" for a refused prompt. kind: the exception's class name."""

    def __init__(self, node: str, kind: str, message: str) -> None:
        super().__init__(f"{node}: {kind}: {message}")
        self.node, self.kind, self.message = node, kind, message


class Graph:
    """An API-format workflow. `add` returns the node's id; `(id, output)` tuples are links."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}
        self._ids = itertools.count(1)

    def add(self, kind: str, /, **inputs: Any) -> str:
        name = str(next(self._ids))
        self.nodes[name] = {
            "class_type": kind,
            "inputs": {key: list(value) if isinstance(value, tuple) else value for key, value in inputs.items()},
        }
        return name

    def quantize(self, source: str, **recipe: Any) -> str:
        defaults = {
            "format": "int8_convrot",
            "group_size": "automatic",
            "scales": "absmax",
            "rounding": "nearest",
            "seed": 0,
            "keep": "",
            "only": "",
            "fallback": "keep in source dtype",
            "device": "auto",
        }
        return self.add("QuantPressQuantize", source=(source, 0), **{**defaults, **recipe})

    def source(self, file: str) -> str:
        return self.add("QuantPressLoadSource", file=f"diffusion_models/{file}.safetensors")

    def unet(self, name: Any) -> str:
        return self.add("UNETLoader", unet_name=name, weight_dtype="default")

    def sample(self, model: str, like: str, save_as: str, steps: int = 4, video: bool = False, seed: int = 3) -> str:
        """Sample with `model`, conditioned to fit the model of node `like`, and save the latent."""
        positive = self.add("QuantPressTestConditioning", model=(like, 0), kind="noise", seed=1)
        negative = self.add("QuantPressTestConditioning", model=(like, 0), kind="zeros", seed=0)
        latent = (
            self.add("EmptyHunyuanLatentVideo", width=64, height=64, length=1, batch_size=1)
            if video
            else self.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        )
        sampled = self.add(
            "KSampler",
            model=(model, 0),
            positive=(positive, 0),
            negative=(negative, 0),
            latent_image=(latent, 0),
            seed=seed,
            steps=steps,
            cfg=3.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )
        return self.add("SaveLatent", samples=(sampled, 0), filename_prefix=save_as)


class Server:
    """A running server; `base` is its base folder. A context manager."""

    def __init__(self, base: Path, *args: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base, self.url = base, f"http://127.0.0.1:{self.port}"
        self.log = base / f"server_{self.port}.log"
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            # Several servers and test workers share the machine: more threads make each of them slower.
            "OMP_NUM_THREADS": "1",
        }
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [
                    str(PYTHON),
                    "main.py",
                    *ARGUMENTS,
                    "--listen",
                    "127.0.0.1",
                    "--port",
                    str(self.port),
                    "--base-directory",
                    str(base),
                    "--disable-auto-launch",
                    "--disable-api-nodes",
                    "--database-url",
                    f"sqlite:///{base}/user/{self.port}.db",
                    *args,
                ],
                cwd=COMFYUI,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def __enter__(self) -> Server:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at once:\n{self.log_text()[-3000:]}")
            try:
                self.call("/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise RuntimeError(f"no answer from ComfyUI in {START_S} s:\n{self.log_text()[-3000:]}")

    def __exit__(self, *_: Any) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log_text(self) -> str:
        return self.log.read_text("utf-8", errors="replace")

    def call(self, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, data=body, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def submit(self, graph: Graph) -> str:
        """Queue the graph; its prompt id. WorkflowError when the server refuses it."""
        try:
            return self.call("/prompt", {"prompt": graph.nodes, "client_id": uuid.uuid4().hex})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise WorkflowError("", "validation", error.read().decode()) from error

    def wait(self, prompt_id: str) -> dict[str, Any]:
        """{node id: its UI output}. WorkflowError when a node fails."""
        end = time.monotonic() + RUN_S
        while time.monotonic() < end:
            entry = self.call(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry.get("status", {}).get("completed") is not None:
                break
            time.sleep(0.05)
        else:
            raise RuntimeError(f"no result in {RUN_S} s:\n{self.log_text()[-3000:]}")
        for name, detail in entry["status"]["messages"]:
            if name == "execution_error":
                raise WorkflowError(
                    detail["node_type"], detail["exception_type"].rpartition(".")[2], detail["exception_message"]
                )
            if name == "execution_interrupted":
                raise WorkflowError(detail["node_type"], "interrupted", "")
        return entry["outputs"]

    def run(self, graph: Graph) -> dict[str, Any]:
        return self.wait(self.submit(graph))

    def latent(self, prefix: str) -> torch.Tensor:
        """The last latent that was saved under this prefix."""
        folder = self.base / "output" / Path(prefix).parent
        files = sorted(folder.glob(f"{Path(prefix).name}_*.latent"))
        return load_file(files[-1])["latent_tensor"].to(torch.float64)


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x - reference).norm() / reference.norm())
