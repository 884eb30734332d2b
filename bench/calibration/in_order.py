"""What quantizing in order of execution is worth on top of a calibration: JSON rows.

There is one row per format and number of calls.

    python bench/calibration/in_order.py --seeds 4 --calls 16 64 256 --formats nvfp4 bnb_nf4

The engine's whole way (convert, quant_core/pipeline/in_order) on the trained model of assets/: a calibration of 40
pictures x 20 steps, then `calls` recorded calls of a picture with and without its prompt, at random steps of the
calibration's seeds. With --classes 5 all of these are of classes 0 to 4. Classes 5 to 9, which no layer was fitted to,
are then judged beside. Judged by one step and by latents on other seeds (model.py), weights alone. `stale` fits every
layer to a model that was quantized before, instead of the final layers before it: the same sums, from one pass over a
finished model.

Rows: results/rounding_in_order_h200.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from activations import commit
from comfyui_quantpress.demo.sampler import simple_sigmas
from comfyui_quantpress.quant_core.algorithms.asymmetric import InputPairs
from comfyui_quantpress.quant_core.calibration.capture.linear_modules import linear_modules
from comfyui_quantpress.quant_core.calibration.evidence import to_evidence
from comfyui_quantpress.quant_core.calibration.storage import load_calibration, save_calibration
from comfyui_quantpress.quant_core.calibration.use import CalibrationUse
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.pipeline.in_order.jobs import LiveModel
from comfyui_quantpress.quant_core.pipeline.layer import quantize_layer
from comfyui_quantpress.quant_core.pipeline.request import Request
from comfyui_quantpress.quant_core.pipeline.run import convert
from comfyui_quantpress.quant_core.policy.general import Policy
from comfyui_quantpress.quant_core.policy.recipe import parse_recipe
from comfyui_quantpress.quant_core.tools.dequantize import dequantize
from model import ASSETS, CLASSES, LAYERS, STEPS, Bench
from safetensors.torch import load_file
from torch import Tensor, nn

SOURCE = ASSETS / "tiny_mmdit_256.safetensors"


def recorded(
    bench: Bench, count: int, pictures: int, classes: int, seed: int = 0
) -> tuple[list[Callable[[], None]], list[int]]:
    """Calls as ComfyUI makes them, one latent with and without its prompt; and the picture that each is of."""
    generator, sigmas, paths = torch.Generator().manual_seed(seed), simple_sigmas(STEPS), {}
    calls, groups = [], []
    for _ in range(count):
        picture, label, step = (
            int(torch.randint(high, (), generator=generator))
            for high in (max(1, pictures // classes), min(classes, pictures), STEPS)
        )
        if picture not in paths:
            paths[picture] = bench.sample(bench.model, picture, range(classes))
        x = paths[picture][step, label : label + 1].repeat(2, 1, 1, 1)
        t = torch.full((2,), 1000.0 * sigmas[step], device=bench.device)
        rows = torch.tensor([label, bench.null], device=bench.device)
        calls.append(lambda x=x, t=t, rows=rows: bench.call(bench.model, x, t, rows))
        groups.append(picture * CLASSES + label)
    return calls, groups


def in_file(bench: Bench, path: Path, folder: Path) -> nn.Module:
    """The model with the decoded weights and the biases of a quantized file."""
    plain = folder / "plain.safetensors"
    dequantize(path, plain, "fp32", overwrite=True)
    model = copy.deepcopy(bench.model)
    model.load_state_dict({name: tensor.float().to(bench.device) for name, tensor in load_file(plain).items()})
    return model


@torch.inference_mode()
def inputs_of(model: nn.Module, names: list[str], calls: list[Callable[[], None]]) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].clone())
        )
        for name in names
    ]
    for call in calls:
        call()
    for handle in handles:
        handle.remove()
    return found


def stale(
    bench: Bench, calibration: Path, fmt_name: str, calls: list[Callable[[], None]], finished: nn.Module
) -> nn.Module:
    """Every layer fitted to what `finished` delivers, whose layers are then all replaced."""
    weights = {name: bench.model.get_submodule(name).weight for name in bench.names}
    before = inputs_of(bench.model, bench.names, calls)
    for name in bench.names:
        bench.model.get_submodule(name).weight = finished.get_submodule(name).weight
    after = inputs_of(bench.model, bench.names, calls)
    for name, weight in weights.items():
        bench.model.get_submodule(name).weight = weight
    model, fmt = copy.deepcopy(bench.model), get_format(fmt_name)
    statistics = load_calibration(calibration).statistics
    for name in bench.names:
        layer = model.get_submodule(name)
        pairs = InputPairs([x.clone() for x in before[name]], [y.clone() for y in after[name]])
        result = quantize_layer(
            name, layer.weight, parse_recipe(fmt, "search", "gptq"), to_evidence(statistics[name]), pairs=pairs
        )
        layer.weight = nn.Parameter(fmt.dequantize(result.tensors, tuple(layer.weight.shape)), requires_grad=False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=4, help="judged seeds, ten pictures each")
    parser.add_argument("--calls", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "bnb_nf4", "float8_e4m3fn_rowwise", "int8_rowwise"])
    parser.add_argument("--pictures", type=int, default=40, help="of the calibration and of the calls")
    parser.add_argument(
        "--no-groups", dest="groups", action="store_false", help="calls of one picture may judge each other"
    )
    parser.add_argument("--classes", type=int, default=CLASSES, help="that the calibration and the calls are of")
    parser.add_argument("--bias", action="store_true", help="with bias correction")
    parser.add_argument("--stale", action="store_true", help="also what fitting to another rounding gives")
    args = parser.parse_args()
    bench = Bench(args.device, args.seeds)
    calls, groups = recorded(bench, max(args.calls), args.pictures, args.classes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration, target = folder / "calibration.safetensors", folder / "model.safetensors"
        save_calibration(bench.calibrate(args.pictures, classes=args.classes), calibration)

        def judged(
            fmt: str, method: str, model: nn.Module, seconds: float, base: dict[str, Any], **more: Any
        ) -> dict[str, Any]:
            latents = bench.latents_db(model)
            found = {"one_step_db": bench.one_step_db(model), "latent_db": float(latents.mean())}
            if args.classes < CLASSES:
                found["unseen_classes_db"] = bench.one_step_db(model, args.classes)
            gains = {f"{key}_over_plain": round(found[key] - base[key], 3) for key in found if base}
            if base:  # of the mean of the seeds' differences
                gains["latent_gain_error_db"] = round(
                    float((latents - base["latents"]).std() / len(latents) ** 0.5), 3
                )
            print(
                json.dumps(
                    {
                        "bench": "in_order",
                        "device": args.device,
                        "commit": commit(),
                        "format": fmt,
                        "method": method,
                        "bias": args.bias,
                        "pictures": args.pictures,
                        "groups": args.groups,
                        "classes": args.classes,
                        "judged_seeds": args.seeds,
                        "seconds": round(seconds, 2),
                        **{key: round(value, 3) for key, value in found.items()},
                        **gains,
                        **more,
                    }
                ),
                flush=True,
            )
            return found | {"latents": latents}

        def quantized(fmt: str, count: int) -> tuple[nn.Module, float, list[float]]:
            live = (
                LiveModel(linear_modules(bench.model, LAYERS), calls[:count], groups if args.groups else (), count)
                if count
                else None
            )
            began = time.perf_counter()
            request = Request(
                SOURCE,
                target,
                parse_recipe(get_format(fmt), "search", "gptq"),
                Policy(only=(LAYERS,)),
                device=args.device,
                overwrite=True,
                calibration=CalibrationUse(calibration, args.bias),
                in_order=live is not None,
            )
            report = convert(request, live=live)
            left = [
                layer.judgement.inputs_left for layer in report.quantized if layer.judgement.inputs_left is not None
            ]
            weight_errors.append(report.weight_error)
            return in_file(bench, target, folder), time.perf_counter() - began, left

        weight_errors: list[float] = []
        for fmt in args.formats:
            plain, seconds, _ = quantized(fmt, 0)
            base = judged(fmt, "plain", plain, seconds, {}, weight_error=round(weight_errors[-1], 4))
            for count in args.calls:
                model, seconds, left = quantized(fmt, count)
                judged(
                    fmt,
                    "in order",
                    model,
                    seconds,
                    base,
                    calls=count,
                    inputs_left=round(sum(left) / len(left), 4),
                    layers_followed=sum(one < 1 for one in left),
                    layers=len(left),
                    weight_error=round(weight_errors[-1], 4),
                )
            if args.stale:
                began = time.perf_counter()
                model = stale(bench, calibration, fmt, calls[: max(args.calls)], plain)
                judged(fmt, "stale", model, time.perf_counter() - began, base, calls=max(args.calls))


if __name__ == "__main__":
    main()
