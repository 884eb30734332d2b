"""Euler sampling as ComfyUI does it for SD3 (sampler euler, scheduler simple).

float32; the noise comes from a CPU generator.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .tiny_mmdit import LATENT_CHANNELS

SHIFT = 3.0  # SD3's time shift
TIME_STEPS = 1000
LATENT_SIDE = 16  # pictures of 128 x 128


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What stands in for a text encoder.

    pooled [R, 128], context [R, 8, 128]. names: one per class. The last row is null.
    """

    pooled: Tensor
    context: Tensor
    names: tuple[str, ...]

    @property
    def null_row(self) -> int:
        return len(self.names)


def load_conditioning(path: Path) -> Conditioning:
    with safe_open(path, framework="pt") as file:
        *names, _null = json.loads(file.metadata()["classes"])
        return Conditioning(file.get_tensor("pooled"), file.get_tensor("context"), tuple(names))


def simple_sigmas(steps: int) -> tuple[float, ...]:
    """steps + 1 noise levels from 1 to 0: every (1000 / steps)-th of the model's 1000 levels, rounded down, then 0."""
    times = [(TIME_STEPS - int(step * TIME_STEPS / steps)) / TIME_STEPS for step in range(steps)]
    return (*(SHIFT * t / (1 + (SHIFT - 1) * t) for t in times), 0.0)


def picture_seed(seed: int, label: int) -> int:
    """The KSampler seed that gives the same noise in ComfyUI."""
    return 1000 * seed + label


def starting_noise(seed: int, labels: Sequence[int]) -> Tensor:
    """float32 [B, 16, 16, 16], each picture from a generator of its own, so a batch changes nothing."""
    shape = (1, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    return torch.cat(
        [torch.randn(shape, generator=torch.Generator().manual_seed(picture_seed(seed, label))) for label in labels]
    )


@torch.inference_mode()
def velocity(model: nn.Module, conditioning: Conditioning, x: Tensor, sigmas: Tensor, rows: Tensor) -> Tensor:
    """One pass of the model. x [B, 16, H, W], sigmas [B] in (0, 1], rows [B] of the conditioning table."""
    return model(x, TIME_STEPS * sigmas, conditioning.context[rows], conditioning.pooled[rows])


@torch.inference_mode()
def sample(
    model: nn.Module, conditioning: Conditioning, labels: Sequence[int], noise: Tensor, steps: int, cfg: float
) -> Tensor:
    """The whole way: latents [steps + 1, B, 16, H, W], the noise first and the finished latents last."""
    batch = len(labels)
    rows = torch.tensor([*labels, *[conditioning.null_row] * batch])
    sigmas = simple_sigmas(steps)
    path = [noise]
    for sigma, following in pairwise(sigmas):
        both = velocity(model, conditioning, path[-1].repeat(2, 1, 1, 1), torch.full((2 * batch,), sigma), rows)
        wanted, unwanted = both.chunk(2)
        path.append(path[-1] + (following - sigma) * (unwanted + cfg * (wanted - unwanted)))
    return torch.stack(path)
