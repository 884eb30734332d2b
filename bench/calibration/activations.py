"""What a captured calibration is worth, on the trained model in assets/: JSON rows, one per measurement.

    python bench/calibration/activations.py PART

snr          nearest, search and gptq per format, judged on other seeds
curve        gptq's gain by the number of prompts, steps and rows
weighting    the same by how rows are weighted over steps and prompts
lora         a Hessian from a LoRA's directions, against nearest, search and captured ones
activations  input_scale from absmax, percentiles and guesses, activations quantized
overhead     slowdown of a run while it is watched, on layers of a large model's size

How it is judged: see model.py. How the LoRA is made: see lora.py.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from comfyui_quantpress.quant_core.calibration.capture.collector import Weighting
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.input_scales.synthesise import SimulationSettings, simulated_magnitude
from comfyui_quantpress.quant_core.numerics.scales import QParams, block_absmax
from lora import measure_lora, train_lora
from model import ASSETS, METHODS, STEPS, Bench
from overhead import measure_overhead
from torch import Tensor, nn

FORMATS = (
    "float8_e4m3fn",
    "float8_e4m3fn_blockwise",
    "int8_blockwise",
    "int8_rowwise",
    "int8_convrot",
    "nvfp4",
    "bnb_nf4",
    "convrot_w4a4",
)
WEIGHTINGS: dict[str, Weighting | None] = {
    "uniform": None,
    "sigma": lambda at, label: at.sigma,
    "1 - sigma": lambda at, label: 1.001 - at.sigma,
    "early x4": lambda at, label: 4.0 if at.step < STEPS // 2 else 1.0,
    "late x4": lambda at, label: 1.0 if at.step < STEPS // 2 else 4.0,
    "cond only": lambda at, label: float(label == "cond"),
    "cond x3": lambda at, label: 3.0 if label == "cond" else 1.0,
}


def quantize_input(x: Tensor, on_disk: str, scale: float | None) -> Tensor:
    """What a runtime's activation quantization makes of x [..., K], float32; scale None: measured from this call."""
    fmt, flat = get_format(on_disk), x.reshape(-1, x.shape[-1]).contiguous()
    scale = scale if scale is not None else fmt.runtime.input_scale.scale_for(float(flat.abs().max()))
    if on_disk == "nvfp4":
        parent = QParams(torch.ones((), device=x.device), torch.tensor(scale, device=x.device))
        qp = fmt.qparams(block_absmax(flat, fmt.block(tuple(flat.shape))) / fmt.element.max, like=parent)
        return fmt.round(flat, qp).view_as(x)
    return (fmt.element.round(flat / scale) * scale).view_as(x)


def with_quantized_inputs(bench: Bench, on_disk: str, scales: dict[str, float | None]) -> nn.Module:
    model = copy.deepcopy(bench.model)
    for name, scale in scales.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, scale=scale: (quantize_input(args[0], on_disk, scale),)
        )
    return model


# --- the measurements ----------------------------------------------------------------------------------------------


def measure_snr(bench: Bench, row: Callable[..., None], formats: Sequence[str]) -> None:
    evidence = bench.evidence(bench.calibrate())
    for fmt, method in itertools.product(formats, METHODS):
        started = time.perf_counter()
        model = bench.quantized(fmt, method, evidence)
        seconds = time.perf_counter() - started
        mean, spread = bench.latent_db(model)
        row(
            format=fmt,
            method=method,
            one_step_db=bench.one_step_db(model),
            latent_db=mean,
            latent_db_std=spread,
            seeds=len(bench.seeds),
            quantize_s=seconds,
        )


def measure_curve(bench: Bench, row: Callable[..., None], formats: Sequence[str]) -> None:
    base = {"prompts": 20, "steps": STEPS, "rows": 512}
    points = [base | {"prompts": n} for n in (1, 2, 3, 5, 10, 20, 40, 80)]
    points += [base | {"steps": n} for n in (1, 2, 4, 8)] + [base | {"prompts": 1, "steps": 4}]
    points += [base | {"rows": n} for n in (8, 32, 128, 2048)]
    for fmt in formats:
        nearest = bench.one_step_db(bench.quantized(fmt, "nearest", None))
        for point in points:
            calibration = bench.calibrate(**point)
            counts = [int(s.count) for s in calibration.statistics.values()]
            model = bench.quantized(fmt, "weighted search + gptq", bench.evidence(calibration))
            row(
                format=fmt,
                **point,
                rows_least=min(counts),
                rows_most=max(counts),
                gain_db=bench.one_step_db(model) - nearest,
                nearest_db=nearest,
            )


def measure_weighting(bench: Bench, row: Callable[..., None], formats: Sequence[str]) -> None:
    """Two captures of 20 other pictures each: how far they lie apart tells what is chance."""
    for (name, weighting), first in itertools.product(WEIGHTINGS.items(), (0, 100)):
        evidence = bench.evidence(bench.calibrate(prompts=20, weighting=weighting, name=name, first=first))
        for fmt in formats:
            row(
                format=fmt,
                weighting=name,
                pictures_from=first,
                seeds=len(bench.seeds),
                one_step_db=bench.one_step_db(bench.quantized(fmt, "weighted search + gptq", evidence)),
            )


def measure_activations(bench: Bench, row: Callable[..., None], formats: Sequence[str]) -> None:
    statistics, lora = bench.calibrate().statistics, train_lora(bench)
    strided = {stride: bench.calibrate(absmax_stride=stride).statistics for stride in (4, 8)}
    for stride, seen in strided.items():
        share = [float(seen[layer].absmax.max() / statistics[layer].absmax.max()) for layer in bench.names]
        row(
            absmax_stride=stride,
            layers=len(share),
            least_share_of_true=min(share),
            mean_share_of_true=sum(share) / len(share),
        )
    for on_disk in [name for name in formats if get_format(name).runtime.input_scale is not None]:
        rule = get_format(on_disk).runtime.input_scale
        sources: dict[str, dict[str, float | None]] = {"measured per call": dict.fromkeys(bench.names)}
        for percent in (100.0, 99.99, 99.9, 99.0):
            name = "absmax" if percent == 100.0 else f"p{percent:g}"
            sources[name] = {layer: rule.scale_for(statistics[layer].percentile(percent)) for layer in bench.names}
        for factor in (0.5, 0.75, 1.5, 2.0, 4.0):
            sources[f"absmax x {factor}"] = {layer: scale * factor for layer, scale in sources["absmax"].items()}
        for stride, seen in strided.items():
            sources[f"absmax of every {stride}th row"] = {
                layer: rule.scale_for(seen[layer].percentile(100.0)) for layer in bench.names
            }
        sources["none (1.0)"] = dict.fromkeys(bench.names, 1.0)
        sources["simulated, p99.9"] = {
            layer: rule.scale_for(
                simulated_magnitude(layer, bench.model.get_submodule(layer).weight, SimulationSettings())
            )
            for layer in bench.names
        }
        sources["LoRA's directions, p99.9"] = {
            layer: rule.scale_for(
                simulated_magnitude(
                    layer, bench.model.get_submodule(layer).weight, SimulationSettings(), lora.directions(layer)
                ),
            )
            for layer in bench.names
        }
        sources["input_scale = weight_scale"] = {
            layer: float(bench.model.get_submodule(layer).weight.abs().max()) / 448 for layer in bench.names
        }
        for name, scales in sources.items():
            row(
                format=on_disk,
                input_scale=name,
                one_step_db=bench.one_step_db(with_quantized_inputs(bench, on_disk, scales)),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("snr", "curve", "weighting", "lora", "activations", "overhead"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=32, help="judged seeds, ten pictures each")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=4608, help="per picture, overhead only")
    parser.add_argument("--blocks", type=int, default=8)
    args = parser.parse_args()
    about = {
        "bench": args.what,
        "device": torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": commit(),
    }

    def row(**values: object) -> None:
        shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        print(json.dumps(about | shown), flush=True)

    if args.what == "overhead":
        return measure_overhead(args.device, row, args.width, args.tokens, args.blocks)
    measure = {
        "snr": measure_snr,
        "curve": measure_curve,
        "weighting": measure_weighting,
        "lora": measure_lora,
        "activations": measure_activations,
    }[args.what]
    return measure(Bench(args.device, args.seeds), row, args.formats)


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ASSETS, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
