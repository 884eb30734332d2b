"""What a format is: data plus a few pure functions. Everything else about a format is derived from here.

A weight passes through four spaces:
    w [N, K]  --prepare-->  work [Np, Kp]  --encode(qparams)-->  codes  --pack-->  tensors as on disk
and back by unpack, decode, restore. `prepare` pads and rotates; algorithms see only `work`, `QParams` and
`round_columns` / `bracket_columns`, so they compose with every format.

Three modules make it up: geometry.py (shapes), grid.py (numerics), and this one (the tensors and the JSON on disk).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checkpoint.header import TensorInfo
from ..numerics.scales import QParams, shape_of
from .grid import ElementGrid
from .input_scale import InputScaleRule
from .records import Runtime, TensorSpec

Self = TypeVar("Self", bound="Format")


@dataclass(frozen=True, kw_only=True)
class Format(ElementGrid):
    """Base of all formats whose codes lie on an element grid times a scale. Subclasses override what differs.

    name: in the list of formats, also the command's and the node's. on_disk: the `format` string in the JSON.
    error_bound: largest |w - decode| as a fraction of the block's absmax, for round-to-nearest with absmax scales;
    tensor_bound: what is added to it as a fraction of the tensor's absmax (a coarse parent scale).
    modelopt_differs: NVIDIA ModelOpt stores the same numbers in another order than ComfyUI.
    quant_type: what bitsandbytes calls the codebook; empty where its structure cannot hold the format.
    """

    on_disk: str
    title: str
    runtime: Runtime
    source: str
    error_bound: float
    tensor_bound: float = 0.0
    modelopt_differs: bool = False
    quant_type: str = ""

    # ---- shapes ------------------------------------------------------------------------------------------------
    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot take the format, as a phrase; None when it can, and then runs."""
        misfit = self.misfit(shape)
        if misfit or len(shape) != 2:
            return misfit
        fmt, (n, k) = self.for_shape(shape), shape
        return fmt.refused_by_kernels(shape, fmt.config((n, k), torch.bfloat16))

    def refused_by_kernels(self, shape: tuple[int, ...], config: Mapping[str, Any] | None = None) -> str | None:
        """Why a weight that is stored so stops or goes wrong when it runs on a GPU, as a phrase; None when it runs.

        config: its comfy_quant object.
        """
        limits = self.runtime.limits
        if limits.of_quantized_inputs and config is not None and config.get("full_precision_matrix_mult"):
            return None
        where = f"the GPU kernels that run {self.name}"
        if self.rotation is not None and limits.rotations and self.rotation not in limits.rotations:
            groups = " or ".join(map(str, limits.rotations))
            return f"its rotation group is {self.rotation}, and {where} take only {groups}"
        if limits.group_sizes and self.group_size not in limits.group_sizes:
            groups = " or ".join(map(str, limits.group_sizes))
            return f"its group_size is {self.group_size}, and {where} are right only for {groups}"
        for what, size, multiple in zip(
            ("out_features", "in_features"), shape, (limits.n_multiple, limits.k_multiple), strict=True
        ):
            if size % multiple:
                return f"{what}={size} is not a multiple of {multiple}, as {where} need"
        return None

    # ---- disk --------------------------------------------------------------------------------------------------
    @abstractmethod
    def tensor_specs(self, shape: tuple[int, int]) -> tuple[TensorSpec, ...]:
        """The tensors of one layer as written, without `comfy_quant`. The weight comes first. shape: its [N, K]."""

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        """Of `tensor_specs`; they do not depend on the shape."""
        return tuple(spec.suffix for spec in self.tensor_specs(self.smallest_shape))

    def config(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        """The `comfy_quant` JSON object of a layer whose source weight had this shape and dtype.

        Where the kernels cannot multiply quantized inputs with it, it says that the weight is to be decoded instead.
        """
        decoded = self.runtime.limits.of_quantized_inputs and self.refused_by_kernels(shape) is not None
        return {"format": self.on_disk} | ({"full_precision_matrix_mult": True} if decoded else {})

    def input_scale_rule(self, config: Mapping[str, Any]) -> InputScaleRule | None:
        """By what the inputs of a layer with this comfy_quant object are divided; None: its runtime ignores it."""
        return None if config.get("full_precision_matrix_mult") else self.runtime.input_scale

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return sum(spec.nbytes for spec in self.tensor_specs(shape)) * 8 / (shape[0] * shape[1])

    def runtime_params(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fields of comfy-kitchen's Params, dtype and shape excepted, from a layer's tensors as on disk."""
        return {"scale": tensors["weight_scale"]}

    @abstractmethod
    def pack(self, codes: Tensor, qp: QParams, shape: tuple[int, int]) -> dict[str, Tensor]:
        """codes [Np, Kp] and scales -> {suffix: tensor} exactly as `tensor_specs(shape)` says."""

    @abstractmethod
    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, QParams]:
        """The inverse of pack."""

    def shape_from(self, tensors: dict[str, tuple[int, ...]], config: dict[str, Any]) -> tuple[int, int]:
        """The logical [N, K] of a stored layer: what its JSON records, else what its tensors' shapes say.

        Whoever reads the layer compares `tensor_specs` of the result with the tensors, and so finds a record that
        contradicts them.
        """
        recorded = config.get("orig_shape") or config.get("shape")
        if recorded:
            return int(recorded[0]), int(recorded[1])
        stored = tensors["weight"]
        return stored[0], stored[1] * (8 // self.element.bits)

    def accepts(self: Self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Self | None:
        """This format with the options a stored layer uses, or None when the layer is another variant."""
        if self.group_sizes and config.get("group_size"):
            return replace(self, group_size=int(config["group_size"]))
        return self

    def recognise(self, infos: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """The comfy_quant object of a layer that has lost it.

        None: the tensors are not this format's, or they do not tell.
        infos: {suffix: header entry}, the weight's among them, with two dimensions.
        """
        return None

    def modelopt_order_fits(self, infos: Mapping[str, TensorInfo]) -> bool:
        """Whether ModelOpt's order of the same tensors has these shapes too; for formats with `modelopt_differs`."""
        return False

    def with_codebook(self: Self, table: Tensor) -> Self:
        """The format of a layer whose file brought this codebook, float32 [L]. Reading it waits for its device."""
        return self

    # ---- the whole way -----------------------------------------------------------------------------------------
    def quantize(self, w: Tensor) -> dict[str, Tensor]:
        """Round to nearest with absmax scales: float [N, K] -> {suffix: tensor}."""
        work = self.prepare(w.to(torch.float32))
        qp = self.absmax(work)
        return self.pack(self.encode(work, qp), qp, shape_of(w))

    def dequantize(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """{suffix: tensor} -> float32 [N, K], in the original basis."""
        return self.restore(self.decode(*self.unpack(tensors, shape)), shape)
