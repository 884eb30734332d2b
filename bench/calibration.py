"""What a captured calibration is worth, on the trained model in assets/: JSON rows, one per measurement.

    python bench/calibration.py snr          nearest, search and gptq per format, judged on other seeds
    python bench/calibration.py curve        gptq's gain by the number of prompts, steps and rows, and by row weighting
    python bench/calibration.py activations  input_scale from absmax, percentiles and guesses, activations quantized
    python bench/calibration.py overhead     slowdown of a run while it is watched, on layers of a large model's size

Calibration samples with seeds from 0, judging with seeds from 1000. One step: SNR of the conditional velocity over
steps 1, 6, 11, 16 of the unquantized model's own path. Latents: SNR after 20 steps, mean over seeds and its spread.
"""
from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from comfyui_quantpress.demo.sampler import load_conditioning, simple_sigmas, starting_noise
from comfyui_quantpress.demo.tiny_mmdit import TinyMMDiT
from comfyui_quantpress.quant_core.calibration.budget import Budget, plan_budget
from comfyui_quantpress.quant_core.calibration.calibration import Calibration
from comfyui_quantpress.quant_core.calibration.collector import CallContext, CaptureSettings, Collector, Weighting
from comfyui_quantpress.quant_core.calibration.evidence import to_evidence
from comfyui_quantpress.quant_core.calibration.input_scales import RULES, scale_for
from comfyui_quantpress.quant_core.calibration.linear_layers import linear_layers
from comfyui_quantpress.quant_core.calibration.synthesise import SimulationSettings, simulated_magnitude
from comfyui_quantpress.quant_core.format import get_format
from comfyui_quantpress.quant_core.layer import quantize_layer
from comfyui_quantpress.quant_core.metrics import relative_error, snr_db
from comfyui_quantpress.quant_core.recipe import Evidence, Recipe
from comfyui_quantpress.quant_core.scales import QParams, block_absmax

ASSETS = Path(__file__).resolve().parent.parent / "assets"
LAYERS = r"joint_blocks\..*\.(attn|mlp)\."          # the block Linears without adaLN
STEPS, CFG, CLASSES = 20, 3.0, 10
JUDGED_FROM, PROBED = 1000, (0, 5, 10, 15)
FORMATS = ("float8_e4m3fn", "float8_e4m3fn_blockwise", "int8_blockwise", "int8_rowwise", "int8_convrot", "nvfp4", "bnb_nf4",
           "convrot_w4a4")
METHODS = {"nearest": ("absmax", "nearest", False), "search": ("search", "nearest", False),
           "weighted search": ("search", "nearest", True), "gptq": ("absmax", "gptq", True),
           "weighted search + gptq": ("search", "gptq", True)}


class Bench:
    """The model, its conditioning, and the points at which it is judged."""

    def __init__(self, device: str, seeds: int) -> None:
        self.device = device
        weights = {name: tensor.float() for name, tensor in load_file(ASSETS / "tiny_mmdit_256.safetensors").items()}
        self.model = TinyMMDiT(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("joint_blocks.")))
        self.model.load_state_dict(weights)
        self.model = self.model.eval().requires_grad_(False).to(device)
        table = load_conditioning(ASSETS / "conditioning.safetensors")
        self.pooled, self.context, self.null = table.pooled.to(device), table.context.to(device), table.null_row
        self.names = list(linear_layers(self.model, LAYERS))
        self.seeds = range(JUDGED_FROM, JUDGED_FROM + seeds)
        self.paths = {seed: self.sample(self.model, seed, range(CLASSES)) for seed in self.seeds}

    def call(self, model: nn.Module, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        with torch.device(self.device):  # the model's constants
            return model(x, t, self.context[rows], self.pooled[rows])

    @torch.inference_mode()
    def sample(self, model: nn.Module, seed: int, labels: Sequence[int], steps: int = STEPS,
               look: Callable[[int, float], None] | None = None) -> Tensor:
        """Latents [steps + 1, B, 16, 16, 16]. look: told the step and sigma before each call of the model."""
        rows = torch.tensor([*labels, *[self.null] * len(labels)], device=self.device)
        path, sigmas = [starting_noise(seed, labels).to(self.device)], simple_sigmas(steps)
        for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
            if look is not None:
                look(step, sigma)
            t = torch.full((len(rows),), 1000.0 * sigma, device=self.device)
            wanted, unwanted = self.call(model, path[-1].repeat(2, 1, 1, 1), t, rows).chunk(2)
            path.append(path[-1] + (following - sigma) * (unwanted + CFG * (wanted - unwanted)))
        return torch.stack(path)

    @torch.inference_mode()
    def one_step_db(self, model: nn.Module) -> float:
        """Against the unquantized model, over every seed, class and probed step."""
        rows, sigmas, errors, powers = torch.arange(CLASSES, device=self.device), simple_sigmas(STEPS), 0.0, 0.0
        for path in self.paths.values():
            for step in PROBED:
                t = torch.full((CLASSES,), 1000.0 * sigmas[step], device=self.device)
                reference = self.call(self.model, path[step], t, rows)
                errors += float((self.call(model, path[step], t, rows) - reference).double().square().sum())
                powers += float(reference.double().square().sum())
        return snr_db(math.sqrt(errors / powers))

    def latent_db(self, model: nn.Module) -> tuple[float, float]:
        """(mean, standard deviation) over seeds, of each seed's ten pictures."""
        found = torch.tensor([snr_db(relative_error(path[-1], self.sample(model, seed, range(CLASSES))[-1]))
                              for seed, path in self.paths.items()])
        return float(found.mean()), float(found.std())

    def calibrate(self, prompts: int = 40, steps: int = STEPS, rows: int = 512, weighting: Weighting | None = None,
                  name: str = "uniform", holdout: float = 1 / 16) -> Calibration:
        """Pictures 0, 1, 2 ... of class 0, 1, 2 ..., ten at once as long as there are ten."""
        modules = linear_layers(self.model, LAYERS)
        collector = Collector(modules, plan_budget({n: m.in_features for n, m in modules.items()}),
                              CaptureSettings(rows_per_step=rows, weighting=weighting, weighting_name=name, holdout=holdout))
        for start in range(0, prompts, CLASSES):
            now = [CallContext()]

            def look(step: int, sigma: float) -> None:
                now[0] = CallContext(step, sigma, ("cond", "uncond"))
            with collector.capture(self.model, lambda: now[0]):
                self.sample(self.model, start // CLASSES, range(min(CLASSES, prompts - start)), steps, look)
        return collector.result()

    def quantized(self, fmt_name: str, method: str, calibration: Calibration | None) -> nn.Module:
        """The model with float32 weights as they are after quantizing."""
        scales, rounding, with_data = METHODS[method]
        model, fmt = copy.deepcopy(self.model), get_format(fmt_name)
        for name in self.names:
            layer = model.get_submodule(name)
            evidence = to_evidence(calibration.statistics[name]) if with_data else Evidence()
            result = quantize_layer(name, layer.weight, Recipe(fmt, scales, rounding), evidence)
            decoded = fmt.for_shape(tuple(layer.weight.shape)).dequantize(result.tensors, tuple(layer.weight.shape))
            layer.weight = nn.Parameter(decoded, requires_grad=False)
        return model


def quantize_input(x: Tensor, on_disk: str, scale: float | None) -> Tensor:
    """What a runtime's activation quantization makes of x [..., K], float32; scale None: measured from this call."""
    rule, flat = RULES[on_disk], x.reshape(-1, x.shape[-1]).contiguous()
    scale = scale if scale is not None else scale_for(rule, float(flat.abs().max()))
    fmt = get_format(on_disk)
    if on_disk == "nvfp4":
        parent = QParams(torch.ones((), device=x.device), torch.tensor(scale, device=x.device))
        qp = fmt.qparams(block_absmax(flat, fmt.block(tuple(flat.shape))) / fmt.element.max, like=parent)
        return fmt.round(flat, qp).view_as(x)
    return (fmt.element.round(flat / scale) * scale).view_as(x)


def with_quantized_inputs(bench: Bench, on_disk: str, scales: dict[str, float | None]) -> nn.Module:
    model = copy.deepcopy(bench.model)
    for name, scale in scales.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, scale=scale: (quantize_input(args[0], on_disk, scale),))
    return model


# --- the measurements ----------------------------------------------------------------------------------------------

def measure_snr(bench: Bench, row: Callable[..., None], formats: Sequence[str]) -> None:
    calibration = bench.calibrate()
    for fmt, method in itertools.product(formats, METHODS):
        started = time.perf_counter()
        model = bench.quantized(fmt, method, calibration)
        seconds = time.perf_counter() - started
        mean, spread = bench.latent_db(model)
        row(format=fmt, method=method, one_step_db=bench.one_step_db(model), latent_db=mean, latent_db_std=spread,
            seeds=len(bench.seeds), quantize_s=seconds)


def measure_curve(bench: Bench, row: Callable[..., None], formats: Sequence[str]) -> None:
    base = {"prompts": 20, "steps": STEPS, "rows": 512}
    points = [base | {"prompts": n} for n in (1, 2, 3, 5, 10, 20, 40, 80)]
    points += [base | {"steps": n} for n in (1, 2, 4, 8)] + [base | {"prompts": 1, "steps": 4}]
    points += [base | {"rows": n} for n in (8, 32, 128, 2048)]
    weightings: dict[str, Weighting | None] = {
        "uniform": None, "sigma": lambda at, label: at.sigma, "1 - sigma": lambda at, label: 1.001 - at.sigma,
        "cond only": lambda at, label: float(label == "cond"), "cond x3": lambda at, label: 3.0 if label == "cond" else 1.0}
    jobs = [(point, "uniform") for point in points] + [(base, name) for name in list(weightings)[1:]]
    for fmt in formats:
        nearest = bench.one_step_db(bench.quantized(fmt, "nearest", None))
        for point, name in jobs:
            calibration = bench.calibrate(**point, weighting=weightings[name], name=name)
            counts = [int(s.count) for s in calibration.statistics.values()]
            model = bench.quantized(fmt, "weighted search + gptq", calibration)
            row(format=fmt, **point, weighting=name, rows_least=min(counts), rows_most=max(counts),
                gain_db=bench.one_step_db(model) - nearest, nearest_db=nearest)


def measure_activations(bench: Bench, row: Callable[..., None], formats: Sequence[str]) -> None:
    statistics = bench.calibrate().statistics
    for on_disk in [name for name in formats if name in RULES]:
        rule = RULES[on_disk]
        sources: dict[str, dict[str, float | None]] = {"measured per call": dict.fromkeys(bench.names)}
        for percent in (100.0, 99.99, 99.9, 99.0):
            name = "absmax" if percent == 100.0 else f"p{percent:g}"
            sources[name] = {layer: scale_for(rule, statistics[layer].percentile(percent)) for layer in bench.names}
        for factor in (0.5, 0.75, 1.5, 2.0, 4.0):
            sources[f"absmax x {factor}"] = {layer: scale * factor for layer, scale in sources["absmax"].items()}
        sources["none (1.0)"] = dict.fromkeys(bench.names, 1.0)
        sources["simulated, p99.9"] = {
            layer: scale_for(rule, simulated_magnitude(layer, bench.model.get_submodule(layer).weight, SimulationSettings()))
            for layer in bench.names}
        sources["input_scale = weight_scale"] = {
            layer: float(bench.model.get_submodule(layer).weight.abs().max()) / 448 for layer in bench.names}
        for name, scales in sources.items():
            row(format=on_disk, input_scale=name, one_step_db=bench.one_step_db(with_quantized_inputs(bench, on_disk, scales)))


class Block(nn.Module):
    """The Linears and the attention of one block of a large diffusion transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(nn.functional.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, -1, 128)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(x, x.shape[-1:]))))


@contextmanager
def no_sync(device: str) -> Iterator[None]:
    """Anything in it that waits for the GPU raises RuntimeError."""
    if not device.startswith("cuda"):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure_overhead(device: str, row: Callable[..., None], width: int, tokens: int, blocks: int) -> None:
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(blocks))).to(device, dtype).requires_grad_(False)
    x, modules = torch.randn(2, tokens, width, device=device, dtype=dtype), linear_layers(model)
    shapes = {name: module.in_features for name, module in modules.items()}

    def seconds(collector: Collector | None, steps: int = 10) -> float:
        def sample() -> None:
            with torch.inference_mode():
                for _ in range(steps):
                    model(x)

        def run() -> float:
            started = time.perf_counter()
            sample()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            return (time.perf_counter() - started) / steps
        if collector is None:
            run()
            return min(run() for _ in range(3))
        step = iter(range(10**6))
        with collector.capture(model, lambda: CallContext(next(step), 1.0, ("cond", "uncond"))):
            run()  # the first call makes the accumulators
            with no_sync(device):
                sample()
            return min(run() for _ in range(3))

    plain = seconds(None)
    for hessians, rows, stride in ((False, 128, 1), (False, 32, 1), (False, 32, 4), (True, 64, 1), (True, 128, 1), (True, 128, 4),
                                   (True, 512, 1)):
        plan = plan_budget(shapes, Budget(64 * 2**30, hessians=hessians))
        watched = seconds(Collector(modules, plan, CaptureSettings(rows_per_step=rows, absmax_stride=stride)))
        row(hessians=hessians, rows_per_step=rows, absmax_stride=stride, width=width, tokens=2 * tokens, blocks=blocks,
            plan=plan.counts(), plain_ms=plain * 1e3, watched_ms=watched * 1e3, slowdown_percent=(watched / plain - 1) * 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("snr", "curve", "activations", "overhead"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=32, help="judged seeds, ten pictures each")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=4608, help="per picture, overhead only")
    parser.add_argument("--blocks", type=int, default=8)
    args = parser.parse_args()
    about = {"bench": args.what, "device": torch.cuda.get_device_name() if args.device.startswith("cuda")
             else f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__, "commit": commit()}

    def row(**values: object) -> None:
        shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        print(json.dumps(about | shown), flush=True)

    if args.what == "overhead":
        return measure_overhead(args.device, row, args.width, args.tokens, args.blocks)
    measure = {"snr": measure_snr, "curve": measure_curve, "activations": measure_activations}[args.what]
    return measure(Bench(args.device, args.seeds), row, args.formats)


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ASSETS, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
