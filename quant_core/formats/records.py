"""The small records that a format is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .input_scale import InputScaleRule


class Element(Protocol):
    """See elements.py: a grid of values with its codes.

    repeats_by_octave: twice the grid is the grid again, but for its ends.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def bits(self) -> int: ...
    @property
    def max(self) -> float: ...
    @property
    def repeats_by_octave(self) -> bool: ...
    def values(self, device: torch.device | str = "cpu") -> Tensor: ...
    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor) -> Tensor: ...
    def round(self, x: Tensor) -> Tensor: ...
    def bracket(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a quantized layer as written: `<layer>.<suffix>`.

    row_axis: the axis that follows the weight's rows. None, and for a single number: the same for all rows.
    optional: files of other tools leave it out, and every reader knows the default.
    signed: its values may be negative.
    """

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    row_axis: int | None = 0
    optional: bool = False
    signed: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class KernelLimits:
    """What the kernels that run a format on a GPU take of what the format could store. Others stop when they run.

    n_multiple, k_multiple: of which N and K have to be multiples. rotations, group_sizes: those it runs; empty: all.
    of_quantized_inputs: they hold where ComfyUI quantizes the inputs, which `full_precision_matrix_mult` turns off.
    """

    n_multiple: int = 1
    k_multiple: int = 1
    rotations: tuple[int, ...] = ()
    group_sizes: tuple[int, ...] = ()
    of_quantized_inputs: bool = False


@dataclass(frozen=True, slots=True)
class Runtime:
    """What runs the format. layout: the QuantizedTensor layout's registered name.

    native_since: the ComfyUI version whose stock loader reads it, None when this pack is needed.
    min_capability: CUDA compute capability of a fast matmul, None when every device dequantizes.
    quantizes_input: the runtime also quantizes the activations.
    input_scale: by what it divides them first; None when it ignores the tensor.
    kernel: how the kernels of this pack decode a code; see layouts/kernels/weight.py. None: they do not know it, and
    the format dequantizes everywhere.
    kitchen_layout: the layout's name in comfy-kitchen, where ComfyUI's own variant of it has another.
    limits: see KernelLimits; `bench/odd_k.py` measures them.
    """

    layout: str
    native_since: str | None
    min_capability: tuple[int, int] | None = None
    quantizes_input: bool = False
    input_scale: InputScaleRule | None = None
    kernel: Literal["fp8", "int8", "nibble"] | None = None
    kitchen_layout: str | None = None
    limits: KernelLimits = KernelLimits()


@dataclass(frozen=True, slots=True)
class ColumnGrid:
    """The decoded values that weights of some columns can take: `zero + scale * levels`.

    levels: float32 ascending, [L] for all weights or [N, C, L] per weight.
    scale: float32 [N, C], negative only with signed_scales. zero: float32 [N, C], or None for 0.
    """

    levels: Tensor
    scale: Tensor
    zero: Tensor | None = None
