"""The files of other quantizers that this pack does not read: how each is known, what reads it, what to take instead.

Told apart by names and dtypes, nothing is read. Source of the names: the files that each program writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..checkpoint.header import TensorInfo
from ..checkpoint.source import Source

_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")
NAMED_SCALE = (
    "`quantpress migrate` takes plain INT8 codes, with one scale or one for each row, when it is told its name."
)


@dataclass(frozen=True, slots=True)
class Family:
    """needs: name endings; some layer has a tensor of each. sentence: what reads it, and what to do.

    dtypes: one of these has the first of them; () for any. anywhere: a pattern that is enough, wherever it stands in a
    name. plain: its weights are ordinary 16-bit ones, and can be quantized. nameable: its weights can be read when the
    user says which tensors are their scales.
    """

    name: str
    needs: tuple[str, ...]
    sentence: str
    dtypes: tuple[str, ...] = ()
    anywhere: str = ""
    plain: bool = False
    nameable: bool = False

    def fits(self, src: Source) -> bool:
        if self.anywhere and any(re.search(self.anywhere, name) for name in src.tensors):
            return True
        return any(True for _ in self._layers(src))

    def _layers(self, src: Source) -> Iterator[str]:
        first, *others = self.needs
        for name, info in src.tensors.items():
            layer = name.removesuffix(first)
            if layer != name and self._coded(info) and all(layer + end in src.tensors for end in others):
                yield layer

    def _coded(self, info: TensorInfo) -> bool:
        return not self.dtypes or info.dtype in self.dtypes


_SVDQUANT = (
    "its 4-bit codes lie in the tile order of one CUDA kernel, beside low-rank branches. Only Nunchaku runs them; "
    "take the 16-bit model."
)
_SDNQ = "only SDNQ reads it, in SD.Next or beside diffusers. Take the 16-bit model."
_MLX = "only MLX reads it, on Apple's computers. Take the 16-bit model."
_TORCHAO = "only torchao reads it, as it packs each kind of weight in its own way. Take the 16-bit model."
_GPTQ_KIN = "its codes are packed into an int32 in an order that differs by writer. Take the 16-bit model."
_CODEBOOKS = "its weights are sums of entries of codebooks, which only its own kernels read. Take the 16-bit model."

# The first that fits is named: those with more needs stand before those with fewer.
FAMILIES = (
    *(
        Family("SVDQuant (Nunchaku)", (".qweight", end), _SVDQUANT)
        for end in (".wscales", ".smooth_factor", ".wtscale")
    ),
    Family(
        "FP-Quant",
        (".qweight", ".forward_hadamard_matrix"),
        "its rows are rotated by matrices of its own. Only FP-Quant in transformers reads it; take the 16-bit model.",
    ),
    Family("GPTQ", (".qweight", ".qzeros", ".g_idx"), "its columns may be reordered by g_idx. Take the 16-bit model."),
    Family(
        "AWQ or GPTQ of transformers",
        (".qweight", ".qzeros", ".scales"),
        "its codes are packed eight to an int32 in an order that differs by writer. Take the 16-bit model.",
    ),
    Family("EETQ", (".qweight", ".weight_scales"), "only EETQ in transformers reads it. Take the 16-bit model."),
    Family("GPTQ, AWQ or one of their kin", (".qweight", ".scales"), _GPTQ_KIN),
    Family("GPTQ, AWQ or one of their kin", (".qweight",), _GPTQ_KIN),
    Family("Marlin", (".B", ".s"), _GPTQ_KIN, dtypes=_INTEGERS),
    Family("EXL2", (".q_weight", ".q_scale"), "only ExLlamaV2 reads it. Take the 16-bit model."),
    Family("EXL3", (".trellis", ".suh"), "only ExLlamaV3 reads it. Take the 16-bit model."),
    Family("AQLM", (".codes", ".codebooks"), _CODEBOOKS),
    Family("QuIP#", (".Qidxs", ".SU"), _CODEBOOKS),
    Family("VPTQ", (".indices", ".centroids.weight"), _CODEBOOKS),
    Family("HIGGS", (".weight", ".scales", ".tables"), _CODEBOOKS, dtypes=_INTEGERS),
    Family(
        "NVFP4 of compressed-tensors",
        (".weight_packed", ".weight_global_scale"),
        "its global scale divides where NVFP4's multiplies, so no exact conversion exists. Take the 16-bit model.",
    ),
    Family(
        "compressed-tensors",
        (".weight_packed",),
        "only vLLM and transformers with compressed-tensors read it. Take the 16-bit model.",
    ),
    Family(
        "compressed-tensors with zero points",
        (".weight", ".weight_scale", ".weight_zero_point"),
        "only vLLM and transformers with compressed-tensors read it. Take the 16-bit model.",
        dtypes=_INTEGERS,
    ),
    Family(
        "LLM.int8 of bitsandbytes",
        (".SCB",),
        "its scales are absmax values over 127, which round when they are divided. Only bitsandbytes reads it. Take "
        "the 16-bit model.",
    ),
    Family(
        "ModelOpt with simulated quantization",
        (".weight_quantizer._amax",),
        "its weights are still in 16 bits, so there is nothing to convert: quantize it like any 16-bit file.",
        plain=True,
    ),
    Family(
        "ModelOpt before export",
        (".weight_quantizer._scale",),
        "it is a training checkpoint: let ModelOpt export it (export_hf_checkpoint), and migrate what comes out.",
    ),
    Family("Quark", (".weight_quantizer.scale",), "only AMD's Quark reads it. Take the 16-bit model."),
    Family(
        "quanto",
        (".weight._data", ".weight._scale"),
        "only optimum-quanto reads it. Take the 16-bit model.",
        anywhere=r"\.weight\._data(\._data)?$",
    ),
    Family("HQQ", (".W_q",), "only HQQ reads it. Take the 16-bit model."),
    Family(
        "torchao",
        ("weight_qdata",),
        _TORCHAO,
        anywhere=r"(_qdata|[._]tensor_impl(\.\w+)?|\.layout_tensor(\.\w+)?|\.weight\.(int_data|packed_weight|qdata))$",
    ),
    *(
        Family("SDNQ", (".weight", end), _SDNQ)
        for end in (".svd_up", ".svd_down")  # beside any codes, FP8 ones too
    ),
    Family("SDNQ", (".weight", ".scale", ".zero_point"), _SDNQ),
    Family("SDNQ, or one of its kin", (".weight", ".scale"), f"{_SDNQ} {NAMED_SCALE}", dtypes=("I8",), nameable=True),
    Family("SDNQ, or one of its kin", (".weight", ".scale"), _SDNQ, dtypes=_INTEGERS[1:]),
    Family("TurboDiffusion", (".int8_weight",), "only TurboDiffusion's own kernels read it. Take the 16-bit model."),
    Family("MLX", (".weight", ".scales", ".biases"), _MLX, dtypes=_INTEGERS),
    Family("MLX", (".weight", ".scales"), _MLX, dtypes=("U32",)),
    Family(
        "Q8 kernels, or one of their kin",
        (".weight", ".scales"),
        f"only the kernels that it was made for read it. Take the 16-bit model. {NAMED_SCALE}",
        dtypes=("I8",),
        nameable=True,
    ),
    Family(
        "TensorRT-LLM",
        (".weight", ".weights_scaling_factor"),
        "its codes are packed for TensorRT-LLM's kernels. Take the 16-bit model.",
        dtypes=_INTEGERS,
    ),
    Family(
        "MXFP4 of transformers",
        (".gate_up_proj_blocks", ".gate_up_proj_scales"),
        "its experts are packed together. Take the 16-bit model.",
    ),
)


def recognise(src: Source, *, scales_named: bool = False) -> Family | None:
    """The foreign family the file belongs to; None for plain files, and for all that this pack reads.

    scales_named: the user says which tensors are the scales.
    """
    return next((one for one in FAMILIES if not (scales_named and one.nameable) and one.fits(src)), None)


def family_problem(src: Source, *, scales_named: bool = False) -> str | None:
    """What the file is, and what to do. A sentence without the path; None when this pack can work with it."""
    family = recognise(src, scales_named=scales_named)
    return None if family is None or family.plain else f"this file is {family.name}: {family.sentence}"
