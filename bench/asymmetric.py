"""Does GPTAQ's asymmetric term (arXiv 2504.02692) pay on top of error feedback? JSON rows, one per format and variant.

    python bench/asymmetric.py --seeds 4 --formats nvfp4 bnb_nf4 float8_e4m3fn_rowwise int8_rowwise

Layers are quantized in order of execution, in one forward pass over all calibration inputs: each layer is quantized
the moment its inputs arrive, so they come from the layers before it as quantized.

    original     the Hessian of the unquantized model's inputs x
    sequential   the Hessian of the inputs y that the quantized layers before produce
    asymmetric   the same, and the target is the unquantized output: min |x W^T - y Wq^T|, which is plain error feedback
                 towards W (E[x y^T]) (E[y y^T] + d)^-1; `share` of the way from W to that; d = `ridge` * mean diagonal

Judged by one step of the model on other seeds (calibration_model.py). Rows: results/rounding_asymmetric.jsonl.

Conclusion (200 calibration samples, 4 seeds x 10 classes): the term pays, the sequential Hessians alone do not.
Sequential -0.04 to +0.08 dB; asymmetric +0.3 to +0.6 dB; with ridge 0.1 or half the way +0.7 to +1.1 dB. Full strength
fits chance in few rows, so it wants the larger ridge. The price is that layers must be quantized in order of execution,
with the inputs of the model before and after at every layer: here all calibration samples fit one pass; a large model
needs a second calibration, block by block, and holds x and y of one block.
"""
from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from calibration import commit
from calibration_model import CLASSES, STEPS, Bench
from torch import Tensor, nn

from comfyui_quantpress.demo.sampler import simple_sigmas
from comfyui_quantpress.quant_core.format import get_format
from comfyui_quantpress.quant_core.layer import quantize_layer
from comfyui_quantpress.quant_core.recipe import Evidence, Recipe


@dataclass(frozen=True, slots=True)
class Variant:
    """sequential: Hessians of the quantized model's inputs. share: 0 keeps the target W."""

    name: str
    sequential: bool
    share: float = 0.0
    ridge: float = 0.0


VARIANTS = (Variant("original", False), Variant("sequential", True), Variant("asymmetric", True, 1.0, 0.01),
            Variant("asymmetric, ridge 0.1", True, 1.0, 0.1), Variant("asymmetric, ridge 1", True, 1.0, 1.0),
            Variant("asymmetric, half", True, 0.5, 0.01))


@torch.inference_mode()
def calibration_inputs(bench: Bench, seeds: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, t, rows of the conditioning): every `stride`-th step of seeds 0, 1, ..., all classes, with and without prompt."""
    xs, ts, rows = [], [], []
    for seed in range(seeds):
        path, sigmas = bench.sample(bench.model, seed, range(CLASSES)), simple_sigmas(STEPS)
        for step in range(0, STEPS, stride):
            xs.append(path[step].repeat(2, 1, 1, 1))
            ts.append(torch.full((2 * CLASSES,), 1000.0 * sigmas[step], device=bench.device))
            rows.append(torch.tensor([*range(CLASSES), *[bench.null] * CLASSES], device=bench.device))
    return torch.cat(xs), torch.cat(ts), torch.cat(rows)


@torch.inference_mode()
def watched(bench: Bench, model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor],
            look: Callable[[str, nn.Linear, Tensor], None]) -> None:
    """One pass; look is called before each of the quantized layers runs, with its inputs [R, K]."""
    handles = [model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, name=name: look(name, module, args[0].reshape(-1, module.in_features))) for name in bench.names]
    bench.call(model, *inputs)
    for handle in handles:
        handle.remove()


def target(w: Tensor, x: Tensor, y: Tensor, hessian: Tensor, variant: Variant) -> Tensor:
    """The weight [N, K] towards which the layer with original inputs x and inputs y, both [R, K], is rounded."""
    if not variant.share:
        return w
    damped = hessian + variant.ridge * hessian.diagonal().mean() * torch.eye(len(hessian), device=w.device)
    cross = (x - y).T @ y / len(y)
    # The ridge is against w, not against 0: where the inputs say nothing the weight stays.
    return w + variant.share * torch.linalg.solve(damped, cross.T @ w.T).T


def quantized(bench: Bench, fmt_name: str, variant: Variant, inputs: tuple[Tensor, Tensor, Tensor],
              originals: dict[str, Tensor]) -> nn.Module:
    model, fmt = copy.deepcopy(bench.model), get_format(fmt_name)

    def quantize(name: str, module: nn.Linear, y: Tensor) -> None:
        seen = y if variant.sequential else originals[name]
        hessian, shape = seen.T @ seen / len(seen), tuple(module.weight.shape)
        w = target(module.weight, originals[name], y, hessian, variant)
        with torch.inference_mode(False):
            result = quantize_layer(name, w.clone(), Recipe(fmt, "search", "gptq"), Evidence(hessian.clone(), count=len(seen)),
                                    measure=False)
            decoded = fmt.for_shape(shape).dequantize(result.tensors, shape)
        module.weight = nn.Parameter(decoded, requires_grad=False)

    watched(bench, model, inputs, quantize)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=4, help="judged seeds, ten pictures each")
    parser.add_argument("--calibration-seeds", type=int, default=2)
    parser.add_argument("--stride", type=int, default=4, help="every n-th step calibrates")
    parser.add_argument("--variants", nargs="+", default=[variant.name for variant in VARIANTS])
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "bnb_nf4", "float8_e4m3fn_rowwise", "int8_rowwise"])
    args = parser.parse_args()
    bench = Bench(args.device, args.seeds)
    inputs = calibration_inputs(bench, args.calibration_seeds, args.stride)
    originals: dict[str, Tensor] = {}
    watched(bench, bench.model, inputs, lambda name, module, x: originals.update({name: x.clone()}))
    for fmt in args.formats:
        base = None
        for variant in (found for found in VARIANTS if found.name in args.variants):
            began = time.perf_counter()
            model = quantized(bench, fmt, variant, inputs, originals)
            seconds, db = time.perf_counter() - began, bench.one_step_db(model)
            base = db if variant is VARIANTS[0] else base
            print(json.dumps({"bench": "asymmetric", "device": args.device, "commit": commit(), "format": fmt,
                              "variant": variant.name, "samples": len(inputs[0]), "judged_seeds": args.seeds,
                              "one_step_db": round(db, 3), "over_original_db": None if base is None else round(db - base, 3),
                              "seconds": round(seconds, 2)}), flush=True)


if __name__ == "__main__":
    main()
