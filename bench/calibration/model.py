"""The trained model of assets/ for the calibration benches: sampled, watched, quantized, and judged against itself.

Calibration samples with seeds from 0, judging with seeds from 1000. One step: SNR of the conditional velocity over
steps 1, 6, 11, 16 of the unquantized model's own path. Latents: SNR after 20 steps, mean over seeds and its spread.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from comfyui_quantpress.demo.sampler import load_conditioning, simple_sigmas, starting_noise
from comfyui_quantpress.demo.tiny_mmdit import TinyMMDiT
from comfyui_quantpress.quant_core.algorithms.evidence import Evidence
from comfyui_quantpress.quant_core.calibration.calibration import Calibration
from comfyui_quantpress.quant_core.calibration.capture.budget import plan_budget
from comfyui_quantpress.quant_core.calibration.capture.collector import (
    CallContext,
    CaptureSettings,
    Collector,
    Weighting,
)
from comfyui_quantpress.quant_core.calibration.capture.linear_modules import linear_modules
from comfyui_quantpress.quant_core.calibration.evidence import to_evidence
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.numerics.metrics import relative_error, snr_db
from comfyui_quantpress.quant_core.pipeline.layer import quantize_layer
from comfyui_quantpress.quant_core.policy.recipe import parse_recipe
from safetensors.torch import load_file
from torch import Tensor, nn

ASSETS = Path(__file__).resolve().parents[2] / "assets"
LAYERS = r"joint_blocks\..*\.(attn|mlp)\."  # the block Linears without adaLN
STEPS, CFG, CLASSES = 20, 3.0, 10
JUDGED_FROM, PROBED = 1000, (0, 5, 10, 15)
METHODS = {
    "nearest": ("absmax", "nearest", False),
    "search": ("search", "nearest", False),
    "weighted search": ("search", "nearest", True),
    "gptq": ("absmax", "gptq", True),
    "weighted search + gptq": ("search", "gptq", True),
}


class Bench:
    """The model, its conditioning, and the points at which it is judged."""

    def __init__(self, device: str, seeds: int) -> None:
        self.device = device
        weights = {name: tensor.float() for name, tensor in load_file(ASSETS / "tiny_mmdit_256.safetensors").items()}
        self.model = TinyMMDiT(
            1 + max(int(name.split(".")[1]) for name in weights if name.startswith("joint_blocks."))
        )
        self.model.load_state_dict(weights)
        self.model = self.model.eval().requires_grad_(False).to(device)
        table = load_conditioning(ASSETS / "conditioning.safetensors")
        self.pooled, self.context, self.null = table.pooled.to(device), table.context.to(device), table.null_row
        self.names = list(linear_modules(self.model, LAYERS))
        self.seeds = range(JUDGED_FROM, JUDGED_FROM + seeds)
        self.paths = {seed: self.sample(self.model, seed, range(CLASSES)) for seed in self.seeds}

    def call(self, model: nn.Module, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return model(x, t, self.context[rows], self.pooled[rows])

    @torch.inference_mode()
    def sample(
        self,
        model: nn.Module,
        seed: int,
        labels: Sequence[int],
        steps: int = STEPS,
        look: Callable[[int, float], None] | None = None,
    ) -> Tensor:
        """Latents [steps + 1, B, 16, 16, 16]. look: told the step and sigma before each call of the model."""
        rows = torch.tensor([*labels, *[self.null] * len(labels)], device=self.device)
        path, sigmas = [starting_noise(seed, labels).to(self.device)], simple_sigmas(steps)
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            if look is not None:
                look(step, sigma)
            t = torch.full((len(rows),), 1000.0 * sigma, device=self.device)
            wanted, unwanted = self.call(model, path[-1].repeat(2, 1, 1, 1), t, rows).chunk(2)
            path.append(path[-1] + (following - sigma) * (unwanted + CFG * (wanted - unwanted)))
        return torch.stack(path)

    @torch.inference_mode()
    def one_step_db(self, model: nn.Module, first: int = 0) -> float:
        """Against the unquantized model, over every seed and probed step, and over the classes from `first` on."""
        rows, sigmas, errors, powers = torch.arange(first, CLASSES, device=self.device), simple_sigmas(STEPS), 0.0, 0.0
        for path in self.paths.values():
            for step in PROBED:
                t = torch.full((len(rows),), 1000.0 * sigmas[step], device=self.device)
                reference = self.call(self.model, path[step][first:], t, rows)
                errors += float((self.call(model, path[step][first:], t, rows) - reference).double().square().sum())
                powers += float(reference.double().square().sum())
        return snr_db(math.sqrt(errors / powers))

    def latent_db(self, model: nn.Module) -> tuple[float, float]:
        """(mean, standard deviation) over seeds, of each seed's ten pictures."""
        found = self.latents_db(model)
        return float(found.mean()), float(found.std())

    def latents_db(self, model: nn.Module) -> Tensor:
        """By seed, of its ten pictures."""
        return torch.tensor(
            [
                snr_db(relative_error(path[-1], self.sample(model, seed, range(CLASSES))[-1]))
                for seed, path in self.paths.items()
            ]
        )

    def calibrate(
        self,
        prompts: int = 40,
        steps: int = STEPS,
        rows: int = 512,
        weighting: Weighting | None = None,
        name: str = "uniform",
        first: int = 0,
        absmax_stride: int = 1,
        classes: int = CLASSES,
    ) -> Calibration:
        """Pictures 0, 1, 2 ... of class 0, 1, 2 ..., as many at once as there are `classes`. first: of the seeds."""
        modules = linear_modules(self.model, LAYERS)
        collector = Collector(
            modules,
            plan_budget({n: m.in_features for n, m in modules.items()}),
            CaptureSettings(
                seed=first, rows_per_step=rows, weighting=weighting, weighting_name=name, absmax_stride=absmax_stride
            ),
        )
        now = [CallContext()]

        def look(step: int, sigma: float) -> None:
            now[0] = CallContext(step, sigma, ("cond", "uncond"))

        for start in range(0, prompts, classes):
            now[0] = CallContext()
            with collector.capture(self.model, lambda: now[0]):
                self.sample(self.model, first + start // classes, range(min(classes, prompts - start)), steps, look)
        return collector.result()

    def evidence(self, calibration: Calibration) -> dict[str, Evidence]:
        return {name: to_evidence(calibration.statistics[name]) for name in self.names}

    def quantized(self, fmt_name: str, method: str, evidence: Mapping[str, Evidence] | None) -> nn.Module:
        """The model with float32 weights as they are after quantizing. evidence: of its layers, by name."""
        scales, rounding, with_data = METHODS[method]
        model, fmt = copy.deepcopy(self.model), get_format(fmt_name)
        for name in self.names:
            layer = model.get_submodule(name)
            known = evidence.get(name, Evidence()) if with_data else Evidence()
            result = quantize_layer(name, layer.weight, parse_recipe(fmt, scales, rounding), known)
            decoded = fmt.for_shape(tuple(layer.weight.shape)).dequantize(result.tensors, tuple(layer.weight.shape))
            layer.weight = nn.Parameter(decoded, requires_grad=False)
        return model
