"""Files of other quantizers, told apart by their tensors' names: what they are, and why they are not converted."""
from __future__ import annotations

from dataclasses import dataclass

from .source import Source


@dataclass(frozen=True, slots=True)
class Family:
    """needs: name endings, every one of which some tensor has. sentence: what is so about it, and what to do.

    plain: its weights are ordinary 16-bit ones, and can be quantized.
    """

    name: str
    needs: tuple[str, ...]
    sentence: str
    plain: bool = False


# The first that fits is named: those with more needs stand before those with fewer.
FAMILIES = (
    Family("SVDQuant (Nunchaku)", (".qweight", ".wscales"),
           "its 4-bit codes lie in the tile order of one CUDA kernel, beside low-rank branches. Only Nunchaku runs them; "
           "take the 16-bit model."),
    Family("GPTQ", (".qweight", ".qzeros", ".g_idx"), "its columns may be reordered by g_idx. Take the 16-bit model."),
    Family("AWQ or GPTQ of transformers", (".qweight", ".qzeros", ".scales"),
           "its codes are packed eight to an int32 in an order that differs by writer. Take the 16-bit model."),
    Family("NVFP4 of compressed-tensors", (".weight_packed", ".weight_global_scale"),
           "its global scale divides where NVFP4's multiplies, so no exact conversion exists. Take the 16-bit model."),
    Family("compressed-tensors", (".weight_packed",), "take the 16-bit model."),
    Family("LLM.int8 of bitsandbytes", (".SCB",), "its scales are absmax values over 127, which round when they are divided. "
           "Take the 16-bit model."),
    Family("ModelOpt with simulated quantization", (".weight_quantizer._amax",),
           "its weights are still in 16 bits, so there is nothing to convert: quantize it like any 16-bit file.", plain=True),
    Family("ModelOpt before export", (".weight_quantizer._scale",),
           "it is a training checkpoint: let ModelOpt export it (export_hf_checkpoint), and migrate what comes out."),
    Family("quanto", (".weight._data", ".weight._scale"), "take the 16-bit model."),
    Family("HQQ", (".W_q", ".zero", ".scale"), "take the 16-bit model."),
    Family("MXFP4 of transformers", (".gate_up_proj_blocks", ".gate_up_proj_scales"),
           "its experts are packed together. Take the 16-bit model."),
)


def recognise(src: Source) -> Family | None:
    """The foreign family the file belongs to; None for plain files, and for all that this pack reads."""
    for family in FAMILIES:
        if all(any(name.endswith(ending) for name in src.tensors) for ending in family.needs):
            return family
    return None


def refusal(src: Source) -> str | None:
    """A sentence that names the family and says what to do; None when this pack can work with the file."""
    family = recognise(src)
    return None if family is None or family.plain else f"{src.path}: this file is {family.name}: {family.sentence}"
