"""LoRA baked before quantizing, against a LoRA applied to the quantized weights: JSON rows on stdout.

For every linear weight in the blocks of the demo model a random LoRA of rank 16 whose change has a given size relative
to the weight. Each row: how far the weight that runs is from weight + LoRA, as SNR in dB over all layers.
  baked      quantize(w + lora)
  requant    quantize(decode(quantize(w)) + lora): a loader that writes the LoRA into quantized weights
  beside     decode(quantize(w)) + lora: a loader that keeps the sum in 16 bits, slower and larger
Run: python bench/speed/lora_bake.py
"""

import json
import math
import subprocess
from pathlib import Path

import torch
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.formats import all_formats
from comfyui_quantpress.quant_core.formats.base import Format
from comfyui_quantpress.quant_core.policy.general import name_rule

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "assets" / "tiny_mmdit_256.safetensors"
RANK = 16


def main() -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    with open_source(MODEL) as src:
        weights = {
            name: src.read(name).float()
            for name, info in src.tensors.items()
            if len(info.shape) == 2 and name_rule(name.removesuffix(".weight")) is None
        }
    for size in (0.02, 0.1):
        for fmt in all_formats():
            print(
                json.dumps(
                    {
                        "bench": "lora_bake",
                        "commit": commit,
                        "model": MODEL.name,
                        "format": fmt.name,
                        "lora_size": size,
                        **compare(fmt, weights, size),
                    }
                ),
                flush=True,
            )


def through(fmt: Format, w: torch.Tensor) -> torch.Tensor:
    """w as it comes back from the format."""
    return fmt.dequantize(fmt.quantize(w), tuple(w.shape))


def compare(fmt: Format, weights: dict[str, torch.Tensor], size: float) -> dict[str, float]:
    """SNR in dB of the three ways, over all layers that the format takes."""
    errors = {"baked": 0.0, "requant": 0.0, "beside": 0.0}
    total, layers = 0.0, 0
    for seed, w in enumerate(weights.values()):
        if fmt.problem(tuple(w.shape)):
            continue
        fitting = fmt.for_shape(tuple(w.shape))
        generator = torch.Generator().manual_seed(seed)
        change = torch.randn(w.shape[0], RANK, generator=generator) @ torch.randn(
            RANK, w.shape[1], generator=generator
        )
        change *= size * w.norm() / change.norm()
        target = w + change
        plain = through(fitting, w)
        ways = {
            "baked": through(fitting, target),
            "requant": through(fitting, plain + change),
            "beside": plain + change,
        }
        for way, got in ways.items():
            errors[way] += float((got - target).double().square().sum())
        total += float(target.double().square().sum())
        layers += 1
    return {
        "layers": layers,
        **{f"{way}_db": round(10 * math.log10(total / error), 2) for way, error in errors.items()},
    }


if __name__ == "__main__":
    main()
