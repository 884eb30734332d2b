"""Guesses of what flows into a layer, for when nobody can run the model: random inputs, or the directions of a LoRA.

A captured calibration is better wherever one can be had. bench/calibration/activations.py measures by how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithms.task import layer_generator
from ..checkpoint.source import Source
from ..errors import InputFileError, RequestError
from ..names.layer_names import LayerNames
from ..names.lora_keys import LoraIndex, index_lora


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """samples: random input rows. percentile: of the magnitudes, 100 for the largest. seed: with the layer's name."""

    samples: int = 64
    percentile: float = 99.9
    seed: int = 42

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RequestError(f"samples is {self.samples}; at least 1 is needed.")
        if not 0.0 < self.percentile <= 100.0:
            raise RequestError(f"percentile is {self.percentile}; above 0 and up to 100 is needed.")


@dataclass(frozen=True, slots=True)
class Directions:
    """Of one layer. rows: float32 [r, K], root mean square 1 each. strength: float32 [r], sums to 1."""

    rows: Tensor
    strength: Tensor


def simulated_magnitude(
    layer: str, w: Tensor, settings: SimulationSettings = SimulationSettings(), directions: Directions | None = None
) -> float:
    """A percentile of |x W^T| over inputs x of unit variance: random ones, or a LoRA's directions where given.

    w: [N, K]. What comes out of a layer stands in for what flows into layers of its kind: that is the whole idea, and
    its weakness. Source: the calibration described in the log of the older tool.
    """
    generator = layer_generator(settings.seed, layer)
    if directions is None:
        x = torch.randn(settings.samples, w.shape[1], generator=generator, device="cpu")
    else:
        x = directions.rows
        if x.shape[1] != w.shape[1]:
            raise RequestError(
                f"{layer}: the LoRA has in_features {x.shape[1]}, the layer {w.shape[1]}. It belongs to another model."
            )
    magnitudes = (x.to(w.device) @ w.to(torch.float32).T).abs().flatten()
    rank = min(magnitudes.numel(), max(1, math.ceil(settings.percentile / 100.0 * magnitudes.numel())))
    return float(magnitudes.kthvalue(rank).values)


def index_lora_file(source: Source, layers: LayerNames) -> LoraIndex:
    """Raises InputFileError."""
    return index_lora(source.tensors, layers, str(source.path))


def read_directions(source: Source, index: LoraIndex, layer: str, in_features: int) -> Directions | None:
    """The LoRA_A rows of a layer, None when the LoRA leaves it alone. Raises InputFileError when the widths differ.

    A row's strength is the size of its share of the LoRA's change, |B_i| |A_i| alpha / rank, where B is known.
    """
    if layer not in index.down:
        return None
    rows, strengths = [], []
    ups, alphas = index.up.get(layer, ()), index.alpha.get(layer, ())
    for number, name in enumerate(index.down[layer]):
        down = source.read(name).to(torch.float32)
        down = down.reshape(len(down), -1) if down.dim() > 1 else down[None]
        if down.shape[1] != in_features:
            raise InputFileError(
                f"{source.path}: {name} has {down.shape[1]} inputs, {layer} has {in_features}. The LoRA "
                "belongs to another model."
            )
        strength = down.norm(dim=1)
        if len(ups) == len(index.down[layer]):
            strength = strength * source.read(ups[number]).to(torch.float32).reshape(-1, len(down)).norm(dim=0)
        if len(alphas) == len(index.down[layer]):
            strength = strength * float(source.read(alphas[number])) / len(down)
        rows.append(down)
        strengths.append(strength.abs())
    stacked, strength = torch.cat(rows), torch.cat(strengths)
    rms = stacked.square().mean(dim=1).sqrt()
    live = torch.isfinite(rms) & (rms > 0) & (strength > 0) & torch.isfinite(strength)
    if not live.any():
        return None
    return Directions(stacked[live] / rms[live, None], strength[live] / strength[live].sum())
