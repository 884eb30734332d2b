"""What a LoRA tells about a layer's inputs. Called by bench/calibration/activations.py lora and activations.

The LoRA is a real one, trained here in a minute: guidance distillation. With it one pass of the model with a class is
to give what two passes with CFG 3 give without it, on points of the model's own paths. Rank 8, A drawn at random and
trained as B is, as every trainer does. How well it learned its task is in the rows (`distilled_db` against `base_db`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from comfyui_quantpress.demo.sampler import simple_sigmas
from comfyui_quantpress.quant_core.algorithms.evidence import Evidence
from comfyui_quantpress.quant_core.algorithms.task import layer_generator
from comfyui_quantpress.quant_core.input_scales.synthesise import Directions
from comfyui_quantpress.quant_core.numerics.metrics import relative_error, snr_db
from model import CFG, CLASSES, STEPS, Bench
from torch import Tensor, nn
from torch.nn import functional as F

RANK, TRAINING_STEPS, LEARNING_RATE, SHARES = 8, 400, 2e-3, (0.1, 0.5, 0.9)


class WithLora(nn.Module):
    """F.linear with a weight of W + B A."""

    def __init__(self, layer: nn.Linear, name: str) -> None:
        super().__init__()
        self.layer = layer
        a = torch.randn(RANK, layer.in_features, generator=layer_generator(0, name)) / layer.in_features**0.5
        self.a, self.b = nn.Parameter(a), nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(F.linear(x, self.a), self.b)


def directions_evidence(directions: Directions, share: float) -> Evidence:
    """A Hessian for inputs that lie along the directions with probability `share`, 0 to 1, and anywhere otherwise.

    The mean of the diagonal is 1 (unit variance per channel).
    """
    scaled = directions.rows * directions.strength.sqrt()[:, None]
    hessian = share * (scaled.T @ scaled)
    hessian.diagonal().add_(1.0 - share)
    return Evidence(hessian=hessian, hessian_diagonal=hessian.diagonal().clone(), count=len(directions.rows))


@dataclass(frozen=True, slots=True)
class TrainedLora:
    """layers: by name. base_db, distilled_db: SNR of one pass against guidance before and after training."""

    layers: Mapping[str, WithLora]
    base_db: float
    distilled_db: float

    def directions(self, name: str) -> Directions:
        """As synthesise.read_directions reads them from a file."""
        a, b = self.layers[name].a.detach(), self.layers[name].b.detach()
        strength = a.norm(dim=1) * b.norm(dim=0)
        return Directions(a / a.square().mean(dim=1, keepdim=True).sqrt(), strength / strength.sum())


def train_lora(bench: Bench, pictures: int = 4) -> TrainedLora:
    """Deterministic on one machine. pictures: per class, of the points that it is trained on."""
    student, layers = copy.deepcopy(bench.model), {}
    for name in bench.names:
        parent, _, last = name.rpartition(".")
        layers[name] = WithLora(student.get_submodule(name), name).to(bench.device)
        setattr(student.get_submodule(parent), last, layers[name])
    paths = [bench.sample(bench.model, 500 + n, range(CLASSES)) for n in range(pictures)]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([p for layer in layers.values() for p in (layer.a, layer.b)], LEARNING_RATE)

    def error(paths_: Sequence[Tensor], path: int, step: int) -> tuple[Tensor, Tensor]:
        """(what one pass gives, what it should give)."""
        x, rows = paths_[path][step].clone(), torch.arange(CLASSES, device=bench.device)
        t = torch.full((CLASSES,), 1000.0 * simple_sigmas(STEPS)[step], device=bench.device)
        with torch.no_grad():
            wanted, unwanted = (
                bench.call(bench.model, x, t, rows),
                bench.call(bench.model, x, t, torch.full_like(rows, bench.null)),
            )
        return bench.call(student, x, t, rows), unwanted + CFG * (wanted - unwanted)

    def judged() -> float:
        held = [path for seed, path in bench.paths.items()][:1]
        with torch.no_grad():
            found = [error(held, 0, step) for step in (0, 5, 10, 15)]
        return snr_db(
            relative_error(torch.stack([target for _, target in found]), torch.stack([out for out, _ in found]))
        )

    before = judged()
    for _ in range(TRAINING_STEPS):
        path, step = (int(torch.randint(n, (), generator=generator)) for n in (pictures, STEPS))
        given, target = error(paths, path, step)
        optimizer.zero_grad()
        F.mse_loss(given, target).backward()
        optimizer.step()
    return TrainedLora(layers, before, judged())


def measure_lora(bench: Bench, row: Callable[..., None], formats: Sequence[str]) -> None:
    """one_step_db of gptq with each source of a Hessian; nearest and search need none."""
    lora, captured = train_lora(bench), bench.evidence(bench.calibrate(prompts=20))
    about = {"base_db": lora.base_db, "distilled_db": lora.distilled_db, "rank": RANK, "seeds": len(bench.seeds)}
    sources: dict[str, dict[str, Evidence] | None] = {"captured": captured}
    for share in SHARES:
        sources[f"LoRA, share {share}"] = {
            name: directions_evidence(lora.directions(name), share) for name in bench.names
        }
    sources["random directions, share 0.5"] = {
        name: directions_evidence(_random(name, len(captured[name].absmax)), 0.5) for name in bench.names
    }
    sources["captured, 8 main directions, share 0.5"] = {
        name: directions_evidence(_main(evidence.hessian), 0.5) for name, evidence in captured.items()
    }
    for fmt in formats:
        for method in ("nearest", "search"):
            row(
                format=fmt,
                method=method,
                hessian=None,
                one_step_db=bench.one_step_db(bench.quantized(fmt, method, None)),
                **about,
            )
        for name, evidence in sources.items():
            for method in ("gptq", "weighted search + gptq"):
                row(
                    format=fmt,
                    method=method,
                    hessian=name,
                    one_step_db=bench.one_step_db(bench.quantized(fmt, method, evidence)),
                    **about,
                )


def _random(name: str, in_features: int) -> Directions:
    rows = torch.randn(RANK, in_features, generator=layer_generator(1, name))
    return Directions(rows / rows.square().mean(dim=1, keepdim=True).sqrt(), torch.full((RANK,), 1 / RANK))


def _main(hessian: Tensor) -> Directions:
    """The strongest directions of the true Hessian: more than any LoRA can know."""
    values, vectors = torch.linalg.eigh(hessian.double())
    rows = vectors[:, -RANK:].T.float()
    return Directions(
        rows / rows.square().mean(dim=1, keepdim=True).sqrt(), (values[-RANK:] / values[-RANK:].sum()).float()
    )
