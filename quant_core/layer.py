"""One layer: weight + recipe + evidence -> the tensors on disk, their JSON, and how well they fit."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .choosers import CHOOSERS
from .metrics import relative_error
from .recipe import Evidence, Recipe, layer_generator
from .rounders import ROUNDERS

NO_EVIDENCE = Evidence()


@dataclass(frozen=True, slots=True)
class LayerResult:
    """tensors: {suffix: tensor} on the compute device. config: the comfy_quant object.

    weight_error: relative Frobenius error of the re-decoded weight; None when it was not measured.
    notes: anything that differs from the recipe (a smaller rotation group, a fallback), in words.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    weight_error: float | None
    notes: tuple[str, ...] = ()


def quantize_layer(layer: str, w: Tensor, recipe: Recipe, evidence: Evidence = NO_EVIDENCE,
                   measure: bool = True) -> LayerResult:
    """w: [N, K] of a float dtype, finite, on the compute device. The maths is float32."""
    shape, source_dtype = tuple(w.shape), w.dtype
    fmt = recipe.format.for_shape(shape)
    notes = () if fmt == recipe.format else (f"rotation group {fmt.rotation}: {recipe.format.rotation} does not divide {shape[1]}",)
    work = fmt.prepare(w.to(torch.float32))
    qp = CHOOSERS[recipe.scales](fmt, work, evidence, recipe.options)
    codes, qp = ROUNDERS[recipe.rounding](fmt, work, qp, evidence, recipe.options,
                                          layer_generator(recipe.seed, layer, "cpu"))
    # Rotation is orthogonal and padding exact, so the error in the work basis is the weight's own.
    error = relative_error(work, fmt.decode(codes, qp)) if measure else None
    return LayerResult(fmt.pack(codes, qp, shape), fmt.config(shape, source_dtype), error, notes)
