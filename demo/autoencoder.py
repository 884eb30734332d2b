"""The demo's picture decoder: the decoding half of a small autoencoder with TAESD's layout."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .tiny_mmdit import LATENT_CHANNELS

_WIDTH = 64
_PREFIX = "taesd_decoder."


def _conv(in_channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(_WIDTH, _WIDTH), nn.ReLU(), _conv(_WIDTH, _WIDTH), nn.ReLU(), _conv(_WIDTH, _WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """Bends values smoothly into (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _doubled(blocks: int) -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), _conv(_WIDTH, _WIDTH, bias=False), *(ResidualBlock() for _ in range(blocks))]


def _decoder() -> nn.Sequential:
    return nn.Sequential(
        SoftClamp(),
        _conv(LATENT_CHANNELS, _WIDTH),
        nn.ReLU(),
        ResidualBlock(),
        ResidualBlock(),
        ResidualBlock(),
        *_doubled(3),
        *_doubled(3),
        *_doubled(1),
        _conv(_WIDTH, 3),
    )


def load_decoder(path: Path) -> nn.Sequential:
    """float32 decoder from an fp16 file; model latents [B, 16, H, W] -> about [0, 1], [B, 3, 8H, 8W]."""
    tensors = {
        key[len(_PREFIX) :]: tensor.float() for key, tensor in load_file(path).items() if key.startswith(_PREFIX)
    }
    with torch.device("meta"):
        decoder = _decoder()
    decoder.load_state_dict(tensors, assign=True)
    return decoder.eval()


@torch.inference_mode()
def decode(decoder: nn.Module, latents: Tensor) -> Tensor:
    """Model latents [B, 16, H, W] -> pictures [B, 3, 8H, 8W], float32 in [0, 1]."""
    return decoder(latents).clamp(0, 1)
