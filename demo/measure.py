"""How far a quantized model's outputs are from the original's. Signal-to-noise ratios in dB; inf means identical."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..quant_core.numerics.metrics import relative_error, snr_db
from .sampler import Conditioning, sample, simple_sigmas, starting_noise, velocity

PROBED_STEPS = 4


@dataclass(frozen=True, slots=True)
class Probe:
    """Points on the original's own way and the original's velocity there. All float32, first dimension B.

    One step from the original's latents does not add up errors of earlier steps, so it orders the formats cleanly.
    """

    x: Tensor
    sigmas: Tensor
    rows: Tensor
    velocities: Tensor

    def snr_db(self, model: nn.Module, conditioning: Conditioning) -> float:
        return output_snr_db(self.velocities, velocity(model, conditioning, self.x, self.sigmas, self.rows))


def probed_steps(steps: int) -> tuple[int, ...]:
    """Counted from 0, spread evenly: 0, 5, 10, 15 of 20."""
    return tuple(sorted({probe * steps // PROBED_STEPS for probe in range(PROBED_STEPS)}))


def make_probe(
    original: nn.Module, conditioning: Conditioning, seeds: tuple[int, ...], steps: int, cfg: float
) -> Probe:
    """Every class with every seed, at the probed steps, conditioned on its class."""
    labels = [*range(len(conditioning.names))] * len(seeds)
    noise = torch.cat([starting_noise(seed, range(len(conditioning.names))) for seed in seeds])
    path, levels, probed = (
        sample(original, conditioning, labels, noise, steps, cfg),
        simple_sigmas(steps),
        probed_steps(steps),
    )
    x = torch.cat([path[step] for step in probed])
    sigmas = torch.tensor([levels[step] for step in probed]).repeat_interleave(len(labels))
    rows = torch.tensor(labels * len(probed))
    return Probe(x, sigmas, rows, velocity(original, conditioning, x, sigmas, rows))


def output_snr_db(reference: Tensor, output: Tensor) -> float:
    """Over the whole batch. -inf when the output holds NaN or Inf: such a model is broken, not close."""
    return snr_db(relative_error(reference, output)) if bool(torch.isfinite(output).all()) else -math.inf


def picture_psnr_db(reference: Tensor, pictures: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in [0, 1], from the mean square error over the batch. -inf as above."""
    error = float((pictures.double() - reference.double()).square().mean())
    if not math.isfinite(error):
        return -math.inf
    return math.inf if error == 0.0 else -10.0 * math.log10(error)
