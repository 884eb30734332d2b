"""Slowdown of a run while it is watched, on layers of a large model's size.

Called by bench/calibration/activations.py overhead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from comfyui_quantpress.quant_core.calibration.capture.budget import Budget, plan_budget
from comfyui_quantpress.quant_core.calibration.capture.collector import CallContext, CaptureSettings, Collector
from comfyui_quantpress.quant_core.calibration.capture.linear_modules import linear_modules
from torch import Tensor, nn


class Block(nn.Module):
    """The Linears and the attention of one block of a large diffusion transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(nn.functional.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, -1, 128)).permute(2, 0, 3, 1, 4)
        )
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(x, x.shape[-1:]))))


@contextmanager
def no_sync(device: str) -> Iterator[None]:
    """Anything in it that waits for the GPU raises RuntimeError."""
    if not device.startswith("cuda"):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def hessian_error(device: str, dtype: torch.dtype, width: int, rows: int = 4096) -> float:
    """Of a captured Hessian against float64: the largest error of an entry, relative to its two channels' sizes."""
    layer = nn.Linear(width, 8, bias=False, device=device, dtype=dtype).requires_grad_(False)
    collector = Collector(
        {"layer": layer}, plan_budget({"layer": width}, Budget()), CaptureSettings(rows_per_step=rows, holdout=0.0)
    )
    g, exact = torch.Generator(device).manual_seed(0), torch.zeros(width, width, device=device, dtype=torch.float64)
    for _ in range(2):  # two runs, so that sums are added to sums
        x = (
            torch.randn(rows, width, generator=g, device=device) * torch.rand(width, generator=g, device=device).exp2()
            + 0.2
        )
        x = x.to(dtype)
        exact += x.double().T @ x.double()
        with collector.capture(layer):
            layer(x)
    size = exact.diagonal().sqrt()
    found = collector.result().statistics["layer"].hessian_sum().double()
    return float(((found - exact).abs() / (size[:, None] * size)).max())


def measure_overhead(device: str, row: Callable[..., None], width: int, tokens: int, blocks: int) -> None:
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    torch.manual_seed(0)
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        row(
            check="Hessian against float64",
            dtype=str(kind),
            width=width,
            largest_error=f"{hessian_error(device, kind, width):.2e}",
        )
    model = nn.Sequential(*(Block(width) for _ in range(blocks))).to(device, dtype).requires_grad_(False)
    x, modules = torch.randn(2, tokens, width, device=device, dtype=dtype), linear_modules(model)
    shapes = {name: module.in_features for name, module in modules.items()}
    step = iter(range(10**9))

    def run(steps: int) -> float:
        """Seconds per step."""
        started = time.perf_counter()
        with torch.inference_mode():
            for _ in range(steps):
                model(x)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps

    def watched(collector: Collector, steps: int) -> float:
        with collector.capture(model, lambda: CallContext(next(step), 1.0, ("cond", "uncond"))):
            return run(steps)

    run(5)
    for hessians, rows, stride in (
        (False, 128, 1),
        (False, 128, 4),
        (False, 128, 8),
        (True, 128, 1),
        (True, 128, 4),
        (True, 64, 4),
        (True, 512, 4),
    ):
        plan = plan_budget(shapes, Budget(64 * 2**30, hessians=hessians))
        collector = Collector(modules, plan, CaptureSettings(rows_per_step=rows, absmax_stride=stride))
        watched(collector, 2)  # makes the accumulators
        with (
            collector.capture(model, lambda: CallContext(next(step), 1.0, ("cond", "uncond"))),
            no_sync(device),
            torch.inference_mode(),
        ):
            for _ in range(9):
                model(x)
        # In turns, as the clock of a GPU drifts; a run of 20 steps works in all that it staged, as a sampling does.
        pairs = [(run(20), watched(collector, 20)) for _ in range(5)]
        plain, seen = (min(times) for times in zip(*pairs, strict=True))
        row(
            hessians=hessians,
            rows_per_step=rows,
            absmax_stride=stride,
            width=width,
            tokens=2 * tokens,
            blocks=blocks,
            plan=plan.counts(),
            plain_ms=plain * 1e3,
            watched_ms=seen * 1e3,
            slowdown_percent=(seen / plain - 1) * 100,
        )
