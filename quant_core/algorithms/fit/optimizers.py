"""Steps on the relaxation's variable, a slice at a time. All take the gradient as given, so no graph is ever built.

stored: the dtype of the variable between steps. parts: into how many slices a layer is cut, so that what is kept and what
a slice takes for the moment stay within three copies of the weight together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_JUMP = 16.0  # times as large a mean square as an iteration before


class Original:
    """Steps of a fixed size along the normalised gradient: variable -= rate * gradient / rms(gradient).

    The mean is over the layer, from each slice's latest gradient: were it over the slice, the projected error would end up
    to 8 % higher. When gradients jump, in the second iteration and when the push sets in, the slices still to come
    in this iteration are of the past and don't count.
    """

    stored, parts = torch.float32, 10

    def __init__(self) -> None:
        self.squares: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def step(self, index: int, variable: Tensor, gradient: Tensor, rate: float) -> None:
        """variable, gradient: float32, of slice `index`. The variable is changed in place, the gradient overwritten.

        Slices come in order, from 0 on in every iteration.
        """
        own = torch.linalg.vector_norm(gradient).square_()
        before = self.squares.get(index, own)  # of the iteration before; in the first there was none, so no jump
        self.squares[index] = own
        self.counts[index] = gradient.numel()
        squares, counts = torch.stack(list(self.squares.values())), list(self.counts.values())
        size = torch.where(
            own > _JUMP * before, squares[: index + 1].sum() / sum(counts[: index + 1]), squares.sum() / sum(counts)
        ).sqrt_()
        variable.sub_(gradient.mul_(rate / size.clamp_(min=1e-30)))


class TorchOptimizer:
    """One of torch.optim's, on one parameter that stands for each slice in turn; what it remembers is swapped with it.

    Between steps the mean of the gradients is bfloat16: a step moves it by a tenth, so nothing is lost. The mean of their
    squares stays float32: it moves by a thousandth. The variable is float16, with steps of 0.001 where it ends.
    """

    stored, parts = torch.float16, 28

    def __init__(self, kind: type[torch.optim.Optimizer]) -> None:
        self.parameter = torch.nn.Parameter(torch.empty(0))
        self.optimizer = kind([self.parameter], lr=1.0, weight_decay=0.0, foreach=False)
        self.kept: dict[int, dict[str, Any]] = {}

    def step(self, index: int, variable: Tensor, gradient: Tensor, rate: float) -> None:
        self.parameter.data, self.parameter.grad = variable, gradient
        self.optimizer.param_groups[0]["lr"] = rate
        state = self.kept.get(index, {})
        if state:
            state["exp_avg"] = state["exp_avg"].float()
        self.optimizer.state[self.parameter] = state
        self.optimizer.step()
        state["exp_avg"] = state["exp_avg"].bfloat16()
        self.kept[index] = state
        self.parameter.grad = None
        self.parameter.data = variable[:0]


OPTIMIZERS = {
    "original": Original,
    "adamw": lambda: TorchOptimizer(torch.optim.AdamW),
    "radam": lambda: TorchOptimizer(torch.optim.RAdam),
}
