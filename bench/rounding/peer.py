"""convert_to_quant's learned rounding on the layers of bench/rounding/synthetic.py.

It runs as its users run it, and our decoder reads what it writes.

It stays an external program; `--peer FOLDER` of bench/rounding/synthetic.py names a folder with it and what it needs:

    pip install --no-deps --target FOLDER convert_to_quant==1.3.1 prodigy-plus-schedule-free tqdm

Each layer becomes a file with this one weight, which the tool's own command converts with its defaults (optimizer
prodigy, 4000 iterations). `seconds` is the conversion alone, file to file, in a process that has converted a small
layer to the same format before. Its bias correction is left out: the weight is judged, as all the others are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.stored.layers import stored_layers
from layers import Layer, errors_of
from safetensors.torch import save_file
from torch import Tensor

# Our format: the options with which its command writes it.
OPTIONS = {
    "float8_e4m3fn": [],
    "float8_e4m3fn_rowwise": ["--scaling_mode", "row"],
    "float8_e4m3fn_blockwise": ["--scaling_mode", "block", "--block_size", "128"],
    "int8_blockwise": ["--int8", "--scaling_mode", "block", "--block_size", "128"],
    "mxfp8": ["--mxfp8"],
    "nvfp4": ["--nvfp4"],
}
METHOD = "peer learned"
_SMALL = 256  # side of the layer that warms up
# Runs in a process of its own, with the peer on its path. JSON jobs come in, and a file of seconds goes out.
_DRIVER = """
import json, sys, time
import torch
from convert_to_quant.cli.main import main

def convert(arguments):
    sys.argv = ["convert_to_quant", *arguments]
    began = time.perf_counter()
    main()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began

jobs, out = json.loads(sys.argv[1]), sys.argv[2]
seconds = []
for warming, arguments in jobs:
    convert(warming)
    seconds.append(convert(arguments))
    with open(out, "w") as file:
        json.dump(seconds, file)
"""


def measure_peer(layer: Layer, formats: list[str], peer: Path) -> Iterator[dict[str, Any]]:
    """A row for each of `formats` that the peer has. Where it fails, `failed` is its last words, instead of errors."""
    known = [name for name in formats if name in OPTIONS]
    if not known:
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_file({"layer.weight": layer.weight.float().cpu().contiguous()}, folder / "input.safetensors")
        save_file({"layer.weight": torch.randn(_SMALL, _SMALL)}, folder / "small.safetensors")
        jobs = [
            (
                _arguments(folder / "small.safetensors", folder / "warm.safetensors", name) + ["--num_iter", "20"],
                _arguments(folder / "input.safetensors", folder / f"{name}.safetensors", name),
            )
            for name in known
        ]
        path = os.pathsep.join(filter(None, [str(peer.resolve()), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, json.dumps(jobs), str(folder / "seconds.json")],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        timings = folder / "seconds.json"
        seconds = json.loads(timings.read_text(encoding="utf-8")) if timings.exists() else []
        for name, took in zip_longest(known, seconds):
            row: dict[str, Any] = {
                "layer": layer.name,
                "shape": list(layer.weight.shape),
                "format": name,
                "method": METHOD,
            }
            output = folder / f"{name}.safetensors"
            if took is None or not output.exists():
                last = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[
                    -1
                ]
                yield row | {"failed": last}
            else:
                yield row | {"seconds": took, "notes": [], **_judged(layer, output)}


def _arguments(source: Path, target: Path, name: str) -> list[str]:
    return ["-i", str(source), "-o", str(target), "--manual_seed", "0", *OPTIONS[name]]


def _judged(layer: Layer, path: Path) -> dict[str, float]:
    with open_source(path) as src:
        decoded: Tensor = stored_layers(src)["layer"].decode(src).to(layer.weight.device)
    output, error = errors_of(layer, decoded)
    return {
        "weight_error": float((decoded - layer.weight).norm() / layer.weight.norm()),
        "output_error": float(error / output),
    }
