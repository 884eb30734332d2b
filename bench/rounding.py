"""What scale search and rounding are worth and what they cost: JSON rows on standard output, a table on standard error.

    python bench/rounding.py synthetic --size 3072x3072 3072x12288     one layer per shape, calibration and held-out rows
    python bench/rounding.py model                                     every Linear of the demo's trained model
    python bench/rounding.py model --models DIR --names tiny_mmdit_192 the same of DIR/<name>.safetensors and DIR/tiny_models.py
    python bench/rounding.py project                                   seconds for a DiT of 12 billion parameters

Synthetic layers: Student-t weights (5 degrees of freedom) with outlier rows and columns; inputs are a mixture of K / 8
Student-t factors plus noise, with 8 strong channels; the share of noise decides how much any error feedback can gain. The held-out rows are drawn apart from the calibration rows.
`output_error` is |X (W - Wq)^T| / |X W^T| on held-out rows; `ratio` compares it with round-to-nearest in the same run.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from comfyui_quantpress.demo.sampler import load_conditioning, simple_sigmas, starting_noise
from comfyui_quantpress.demo.tiny_mmdit import TinyMMDiT
from comfyui_quantpress.quant_core.format import all_formats, get_format
from comfyui_quantpress.quant_core.layer import quantize_layer
from comfyui_quantpress.quant_core.recipe import Evidence, Recipe

ASSETS = Path(__file__).resolve().parent.parent / "assets"
# name: (scales, rounding, options, sees data). The first one is what all others are compared with.
METHODS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "nearest": ("absmax", "nearest", {}, False),
    "search": ("search", "nearest", {}, False),
    "weighted search": ("search", "nearest", {}, True),
    "learned": ("search", "learned", {}, False),
    "learned output": ("absmax", "learned", {}, True),
    "gptq plain": ("absmax", "gptq", {"order": "natural", "sweeps": 0}, True),
    "gptq ordered": ("absmax", "gptq", {"sweeps": 0}, True),
    "gptq absmax": ("absmax", "gptq", {}, True),
    "gptq no refit": ("search", "gptq", {"refits": 0}, True),
    "gptq": ("search", "gptq", {}, True),
}
NOISE = 0.1      # with it plain GPTQ gains what it does on the inputs of the project's reference measurements, about 0.3 x
QUICK = ("nearest", "search", "weighted search", "gptq plain", "gptq")
# A 12-billion-parameter DiT of FLUX's shape: 19 double and 38 single blocks, 3072 wide (fused qkv and mlp).
FLUX = {(9216, 3072): 38, (3072, 3072): 38, (12288, 3072): 38, (3072, 12288): 38, (18432, 3072): 38,
        (21504, 3072): 38, (3072, 15360): 38}


@dataclass(frozen=True, slots=True)
class Layer:
    """weight [N, K]; evidence of the calibration rows; held_out: float32 [R, K]."""

    name: str
    weight: Tensor
    evidence: Evidence
    held_out: Tensor


def synthetic(n: int, k: int, rows: int, device: str, seed: int = 0) -> Layer:
    """A layer of the setting above; the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=generator, device=device)  # noqa: E731
    some = lambda count, of: torch.randperm(of, generator=generator, device=device)[:max(1, count)]  # noqa: E731

    def student(*size: int) -> Tensor:
        return normal(*size) / (sum(normal(*size).square_() for _ in range(5)) / 5).sqrt_()

    weight = student(n, k) * 0.02
    weight[some(n // 256, n)] *= 3
    weight[:, some(k // 256, k)] *= 3
    mixing = normal(max(8, k // 8), k) / max(8, k // 8) ** 0.5
    strong = torch.ones(k, device=device)
    strong[some(8, k)] = 20
    draw = lambda count: (student(count, mixing.shape[0]) @ mixing + NOISE * student(count, k)) * strong  # noqa: E731
    hessian = torch.zeros(k, k, device=device)
    for _ in range(0, rows, 2048):
        part = draw(2048)
        hessian.addmm_(part.T, part, alpha=1 / rows)
    return Layer(f"synthetic {n}x{k}", weight, Evidence(hessian=hessian, count=rows), draw(2048))


def demo_model(device: str) -> tuple[nn.Module, Any]:
    """The demo's model, and a function that samples all classes from a seed."""
    weights = {name: tensor.float() for name, tensor in load_file(ASSETS / "tiny_mmdit_256.safetensors").items()}
    model = TinyMMDiT(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("joint_blocks.")))
    model.load_state_dict(weights)
    model.eval().to(device)
    table = load_conditioning(ASSETS / "conditioning.safetensors")
    pooled, context = table.pooled.float().to(device), table.context.float().to(device)

    @torch.inference_mode()
    def sample(seed: int) -> None:
        labels = torch.arange(table.null_row, device=device)
        x, null = starting_noise(seed, labels.tolist()).to(device), torch.full_like(labels, table.null_row)
        sigmas = simple_sigmas(20)
        for now, after in zip(sigmas, sigmas[1:]):
            t = torch.full((len(labels),), now * 1000, device=device)
            wanted, plain = model(x, t, context[labels], pooled[labels]), model(x, t, context[null], pooled[null])
            x = x + (after - now) * (plain + 3.0 * (wanted - plain))

    return model, sample


def other_model(folder: Path, name: str, device: str) -> tuple[nn.Module, Any]:
    """The same for `<folder>/<name>.safetensors` with the code in `<folder>/tiny_models.py`."""
    spec = importlib.util.spec_from_file_location("tiny_models", folder / "tiny_models.py")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    model = code.load_mmdit(str(folder / f"{name}.safetensors")).to(device)
    decoder = code.load_autoencoder(str(folder / "tiny_taesd.safetensors")).to(device)
    table = load_file(folder / "conditioning.safetensors")
    return model, lambda seed: code.sample(model, decoder, (table["pooled"], table["context"]), device, per_class=1,
                                           seed=seed, cfg=3)


def observed(model: nn.Module, sample: Any, seeds: tuple[int, ...], keep: int) -> dict[str, tuple[Tensor, Tensor, int]]:
    """{Linear: (sum of x^T x, `keep` random rows, rows seen)} while sampling from each seed."""
    seen: dict[str, tuple[Tensor, list[Tensor], int]] = {}

    def watch(name: str, module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().reshape(-1, module.in_features).float()
        total, parts, count = seen.get(name, (torch.zeros(x.shape[1], x.shape[1], device=x.device), [], 0))
        seen[name] = (total + x.T @ x, [*parts, x] if keep else parts, count + len(x))

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_pre_hook(lambda m, args, name=name: watch(name, m, args))
               for name, module in linears.items()]
    for seed in seeds:
        sample(seed)
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(0)

    def chosen(parts: list[Tensor]) -> Tensor:
        rows = torch.cat(parts) if parts else torch.empty(0)
        return rows[torch.randperm(len(rows), generator=generator)[:keep].to(rows.device)]

    return {name: (total, chosen(parts), count) for name, (total, parts, count) in seen.items()}


def trained(model: nn.Module, sample: Any, name: str) -> Iterator[Layer]:
    """Every Linear, calibrated on seeds 1 and 2, judged on seed 77."""
    calibration, held_out = observed(model, sample, (1, 2), 0), observed(model, sample, (77,), 1024)
    for layer, (total, _, count) in calibration.items():
        weight = model.get_submodule(layer).weight.detach()
        yield Layer(f"{name}.{layer}", weight, Evidence(hessian=total / count, count=count), held_out[layer][1])


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(layer: Layer, fmt_name: str, method: str, repeat: int) -> dict[str, Any]:
    """One row. The fastest of `repeat` timed runs after a first one on a GPU, where kernels compile."""
    scales, rounding, options, data = METHODS[method]
    device, shape = str(layer.weight.device), tuple(layer.weight.shape)
    recipe = Recipe(get_format(fmt_name), scales, rounding, options=options)
    evidence = layer.evidence if data else Evidence()
    seconds, peak, result = [], 0, None
    for _ in range(repeat + device.startswith("cuda")):
        del result
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            peak = -torch.cuda.memory_allocated()
        synchronize(device)
        began = time.perf_counter()
        result = quantize_layer(layer.name, layer.weight, recipe, evidence, measure=False)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
        if device.startswith("cuda"):
            peak += torch.cuda.max_memory_allocated()
    decoded = recipe.format.for_shape(shape).dequantize(result.tensors, shape)
    output = layer.held_out @ layer.weight.T
    error = layer.held_out @ (decoded - layer.weight).T
    return {"layer": layer.name, "format": fmt_name, "method": method, "seconds": min(seconds),
            "weight_error": float((decoded - layer.weight).norm() / layer.weight.norm()),
            "output_error": float(error.norm() / output.norm()), "notes": list(result.notes),
            "objective": result.judgement.objective, "fell_back": result.judgement.fell_back,
            "learned_ratio": _own_ratio(result.judgement),
            "peak_weight_copies": peak / (4 * layer.weight.numel()) if peak else None}


def _own_ratio(judgement: Any) -> float | None:
    return judgement.error / judgement.nearest_error if judgement.nearest_error else None


def machine(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
                            cwd=Path(__file__).parent).stdout.strip()
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"machine": name, "torch": torch.__version__, "commit": commit or "unknown", "threads": torch.get_num_threads()}


def run(layers: Iterator[Layer], formats: list[str], methods: list[str], repeat: int, about: dict[str, Any]) -> list[dict]:
    """Measures, prints rows, and returns them with `ratio` to round-to-nearest filled in."""
    rows = []
    for layer in layers:
        for name in formats:
            if get_format(name).problem(tuple(layer.weight.shape)) is not None:
                continue
            nearest = None
            for method in ["nearest", *(m for m in methods if m != "nearest")]:
                row = measure(layer, name, method, repeat)
                nearest = nearest or row
                for key in ("output", "weight"):
                    base = nearest[f"{key}_error"]
                    row[f"{key}_ratio"] = row[f"{key}_error"] / base if base else None
                rows.append(row)
                print(json.dumps(about | row), flush=True)
    return rows


def table(rows: list[dict], single: bool) -> None:
    """Per format and method: medians over the layers, and the worst; every layer where there is one per shape."""
    keys = dict.fromkeys((row["layer"] if single else "", row["format"], row["method"]) for row in rows)
    print(f"{'layer':22s} {'format':24s} {'method':16s} {'out':>8s} {'x near':>7s} {'worst':>6s} {'w x near':>8s} "
          f"{'s':>8s} {'copies':>6s}", file=sys.stderr)
    for key in keys:
        group = [row for row in rows if (row["layer"] if single else "", row["format"], row["method"]) == key]
        middle = lambda what, group=group: statistics.median(row[what] or 0.0 for row in group)  # noqa: E731
        print(f"{key[0]:22s} {key[1]:24s} {key[2]:16s} {middle('output_error'):8.4f} {middle('output_ratio'):7.3f} "
              f"{max(row['output_ratio'] or 0 for row in group):6.3f} {middle('weight_ratio'):8.4f} "
              f"{middle('seconds'):8.4f} {middle('peak_weight_copies'):6.2f}", file=sys.stderr)


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
    parser.add_argument("what", choices=("synthetic", "model", "project"))
    parser.add_argument("--size", nargs="+", default=["768x768"], help="NxK, for synthetic")
    parser.add_argument("--rows", type=int, default=8192, help="calibration rows, for synthetic")
    parser.add_argument("--formats", nargs="+", default=[fmt.name for fmt in all_formats()])
    parser.add_argument("--methods", nargs="+", default=list(QUICK), choices=list(METHODS))
    parser.add_argument("--models", type=Path, help="folder with tiny_models.py and the models' files")
    parser.add_argument("--names", nargs="+", default=["tiny_mmdit_256"])
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
        pairs = [(name, other_model(args.models, name, args.device)) if args.models else (name, demo_model(args.device))
                 for name in (args.names if args.models else ["demo"])]
        layers = (layer for name, (model, sample) in pairs for i, layer in enumerate(trained(model, sample, name))
                  if i % args.stride == 0)
    table(run(layers, args.formats, args.methods, args.repeat, about), args.what == "synthetic")


if __name__ == "__main__":
    main()
