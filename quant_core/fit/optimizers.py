"""Steps on the relaxation's variable. All take the gradient as given, so no graph is ever built."""
from __future__ import annotations

import torch
from torch import Tensor


class Original:
    """Steps of a fixed size along the normalised gradient: variable -= rate * gradient / rms(gradient)."""

    def __init__(self, variable: Tensor, rate: float) -> None:
        self.variable = variable

    def step(self, gradient: Tensor, rate: float) -> None:
        size = gradient.square().mean().sqrt()
        self.variable.sub_(gradient * (rate / size.clamp(min=1e-30)))


class TorchOptimizer:
    """One of torch.optim's."""

    def __init__(self, variable: Tensor, rate: float, kind: type[torch.optim.Optimizer]) -> None:
        self.variable = variable
        self.optimizer = kind([variable], lr=rate, weight_decay=0.0)

    def step(self, gradient: Tensor, rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = rate
        self.variable.grad = gradient
        self.optimizer.step()
        self.variable.grad = None


OPTIMIZERS = {
    "original": Original,
    "adamw": lambda variable, rate: TorchOptimizer(variable, rate, torch.optim.AdamW),
    "radam": lambda variable, rate: TorchOptimizer(variable, rate, torch.optim.RAdam),
}
