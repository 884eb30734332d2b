"""The demo's diffusion model: a small MMDiT with the tensor names of SD3, plain torch, for inference only.

Forward passes agree with ComfyUI's own MMDiT class to 2e-6 (assets/CARD.md). What a Linear's weight is, a plain tensor
or a QuantizedTensor, is decided by whoever loads it: the forward pass calls F.linear either way.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_CHANNELS = 16
HEAD_SIZE = 64
PATCH = 2
CONTEXT_FEATURES = POOLED_FEATURES = 128
POSITION_SIDE = 16  # side of the stored position table, in patches
TIME_FEATURES = 256


class Embedder(nn.Module):
    """Two Linears with SiLU between, as used for the time step and for the pooled conditioning."""

    def __init__(self, in_features: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_features, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class FeedForward(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    def __init__(self, hidden: int, pre_only: bool) -> None:
        super().__init__()
        self.heads = hidden // HEAD_SIZE
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.ln_q, self.ln_k = nn.RMSNorm(HEAD_SIZE, eps=1e-6), nn.RMSNorm(HEAD_SIZE, eps=1e-6)
        if not pre_only:
            self.proj = nn.Linear(hidden, hidden)

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, hidden] -> three of [B, T, heads, 64], the first two normalised."""
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, HEAD_SIZE).unbind(2)
        return self.ln_q(q), self.ln_k(k), v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, heads, 64] each -> [B, T, hidden]."""
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return mixed.transpose(1, 2).flatten(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Stream(nn.Module):
    """One side of a joint block, context or picture. pre_only: nothing follows, so it only gives keys and values."""

    def __init__(self, hidden: int, pre_only: bool = False) -> None:
        super().__init__()
        self.modulations = 2 if pre_only else 6
        self.attn = Attention(hidden, pre_only)
        if not pre_only:
            self.mlp = FeedForward(hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, self.modulations * hidden))

    def finish(self, x: Tensor, attended: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        x = x + m[2][:, None] * self.attn.proj(attended)
        return x + m[5][:, None] * self.mlp(modulate(x, m[3], m[4]))


class JointBlock(nn.Module):
    def __init__(self, hidden: int, last: bool) -> None:
        super().__init__()
        self.context_block = Stream(hidden, pre_only=last)
        self.x_block = Stream(hidden)
        self.last = last

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        m_context = self.context_block.adaLN_modulation(c).chunk(self.context_block.modulations, 1)
        m_x = self.x_block.adaLN_modulation(c).chunk(self.x_block.modulations, 1)
        of_context = self.context_block.attn.query_key_value(modulate(context, m_context[0], m_context[1]))
        of_x = self.x_block.attn.query_key_value(modulate(x, m_x[0], m_x[1]))
        attended = attend(*(torch.cat(pair, 1) for pair in zip(of_context, of_x, strict=True)))
        tokens = context.shape[1]
        x = self.x_block.finish(x, attended[:, tokens:], m_x)
        if not self.last:
            context = self.context_block.finish(context, attended[:, :tokens], m_context)
        return context, x


class FinalLayer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, PATCH * PATCH * LATENT_CHANNELS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(c).chunk(2, 1)))


class PatchEmbedder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(LATENT_CHANNELS, hidden, PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TinyMMDiT(nn.Module):
    """depth blocks of width 64 * depth; conditioned on 8 context tokens and a pooled vector, 128 numbers each."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        hidden = HEAD_SIZE * depth
        self.x_embedder = PatchEmbedder(hidden)
        self.t_embedder, self.y_embedder = Embedder(TIME_FEATURES, hidden), Embedder(POOLED_FEATURES, hidden)
        self.context_embedder = nn.Linear(CONTEXT_FEATURES, hidden)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", torch.empty(1, POSITION_SIDE**2, hidden))
        self.joint_blocks = nn.ModuleList(JointBlock(hidden, last=i == depth - 1) for i in range(depth))
        self.final_layer = FinalLayer(hidden)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Noisy latents x [B, 16, H, W] at t [B] = 1000 * sigma -> velocity (noise - data), same shape as x."""
        batch, channels, height, width = x.shape
        rows, cols = height // PATCH, width // PATCH
        c = self.t_embedder(time_features(t)) + self.y_embedder(pooled)
        context = self.context_embedder(context)
        tokens = self.x_embedder(x) + self.positions(rows, cols)
        for block in self.joint_blocks:
            context, tokens = block(context, tokens, c)
        patches = self.final_layer(tokens, c).view(batch, rows, cols, PATCH, PATCH, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)

    def positions(self, rows: int, cols: int) -> Tensor:
        """The middle of the stored table: [1, rows * cols, hidden]."""
        top, left = (POSITION_SIDE - rows) // 2, (POSITION_SIDE - cols) // 2
        table = self.pos_embed.view(POSITION_SIDE, POSITION_SIDE, -1)
        return table[top : top + rows, left : left + cols].reshape(1, rows * cols, -1)


def time_features(t: Tensor) -> Tensor:
    """t [B] -> float32 [B, 256]: cosines, then sines, of 128 frequencies from 1 down to 1/10000."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * frequencies[None]
    return torch.cat([angle.cos(), angle.sin()], -1)
