"""A low-rank part of what quantizing lost, written as a LoRA file that stock ComfyUI loads beside the model.

It has to stay apart from the quantized weights, as in ComfyUI's bypass loader. The usual loader adds it to them and
rounds the sum again: measured 2 to 8 dB worse than without it (docs/loras.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import OutputError, RequestError
from ..names.prefixes import lora_name
from .factor import damped
from .fit.objectives import leading_directions
from .objective import Objective, ratio
from .options import Settings, setting

# For users, and in the file's header.
HOW_TO_LOAD = (
    "Load it with ComfyUI's node Load LoRA (Bypass, Model Only), strength 1. The usual Load LoRA rounds the sum of "
    "weight and LoRA again, which makes the model worse."
)
_DAMPING = 0.01  # share of the Hessian's diagonal
_SCARCE = 0.5  # damping grows to this many times K / rows: few rows must not decide which errors count
_SPARE = 8


@dataclass(frozen=True, slots=True)
class LowRank(Settings):
    """Which layers get a low-rank part. rank: 0 writes none. target: regex (searched) of layer names; "" takes all.

    depth: only blocks with a smaller index; the index is the first number in the layer's name. 0 takes all.
    """

    rank: int = setting(0, low=0, high=1024, option="residual_rank")
    target: str = setting("", option="residual_target")
    depth: int = setting(0, low=0, option="residual_depth")

    def wants(self, layer: str) -> bool:
        """Whether this layer gets a low-rank part. RequestError when `target` does not compile."""
        if self.rank == 0:
            return False
        try:
            if not re.search(self.target, layer):
                return False
        except re.error as problem:
            raise RequestError(
                f"residual_target: {self.target!r} is not a regular expression: {problem}. Correct it.", "options"
            ) from problem
        number = re.search(r"\d+", layer)
        return self.depth == 0 or (number is not None and int(number.group()) < self.depth)


@dataclass(frozen=True, slots=True)
class Residual:
    """up: bfloat16 [N, r]. down: bfloat16 [r, K]. up @ down approximates W - Wq.

    error, corrected_error: relative, of the layer without and with it, under the objective that chose it.
    """

    up: Tensor
    down: Tensor
    error: float
    corrected_error: float


def low_rank(error: Tensor, rank: int, objective: Objective) -> tuple[Tensor, Tensor]:
    """The best up [N, r] and down [r, K] for tr((E - up down) H (E - up down)^T); without H for |E - up down|.

    error: float32 [N, K]. r = rank, or less where N or K is smaller.
    """
    rank = min(rank, *error.shape)
    root, hessian = None, objective.hessian
    if hessian is not None:
        share = max(_DAMPING, _SCARCE * len(hessian) / objective.rows) if objective.rows else _DAMPING
        added = damped(hessian.diagonal(), share)
        root, info = torch.linalg.cholesky_ex(hessian + added.diag())
        root = root if int(info) == 0 else (hessian.diagonal().clamp(min=0) + added).sqrt().diag()
    whole = error if root is None else error @ root
    # An exact SVD takes seconds at 3072 x 3072; a few directions more than asked for make the randomised one as good.
    basis = leading_directions(whole, min(rank + _SPARE, *error.shape), torch.Generator().manual_seed(0))[1]
    left, size, right = torch.linalg.svd(whole @ basis, full_matrices=False)
    right = right @ basis.T
    up, down = left[:, :rank] * size[:rank].sqrt(), right[:rank] * size[:rank, None].sqrt()
    if root is not None:
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    return up, down


def make_residual(w: Tensor, error: Tensor, rank: int, objective: Objective) -> Residual:
    """w, error = W - Wq: float32 [N, K] in the layer's own basis, and so is the objective."""
    up, down = (part.to(torch.bfloat16) for part in low_rank(error, rank, objective))
    reference = objective.loss(w)
    left = error - up.float() @ down.float()
    return Residual(up, down, ratio(objective.loss(error), reference), ratio(objective.loss(left), reference))


def lora_keys(layer: str) -> tuple[str, str]:
    """The tensor names of a layer's up and down parts, as ComfyUI looks them up. layer: as in the checkpoint."""
    return f"{lora_name(layer)}.lora_up.weight", f"{lora_name(layer)}.lora_down.weight"


def save_residuals(
    path: str | Path, residuals: Mapping[str, Residual], metadata: Mapping[str, str] | None = None
) -> None:
    """{layer: Residual} -> one safetensors file, written beside and renamed. No alpha: strength 1 is the whole part.

    Raises RequestError: there is no residual; OutputError.
    """
    target = Path(path)
    tensors: dict[str, Tensor] = {}
    for layer, residual in residuals.items():
        up, down = lora_keys(layer)
        tensors[up], tensors[down] = residual.up.cpu().contiguous(), residual.down.cpu().contiguous()
    if not tensors:
        raise RequestError("no layer matches residual_target and residual_depth: there is no low-rank part to write.")
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_bytes(save(tensors, metadata={"modelspec.usage_hint": HOW_TO_LOAD, **(metadata or {})}))
        partial.replace(target)
    except OSError as problem:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"{target}: the low-rank part cannot be written: {problem}. Choose another folder."
        ) from problem
