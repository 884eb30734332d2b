"""Files that are not models this pack can work with: what they are, and what to do.

Told apart by names, nothing is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..checkpoint.source import Source
from ..checkpoint.suffixes import INDEX_SUFFIX
from ..names.lora_parts import Kind, lora_tensor

CALIBRATION_KEY = "quantpress_calibration"
_ADAPTER = re.compile(r"\.(lora[._]|hada_|lokr_|oft_)")
_SHARD = re.compile(r"-(?P<number>\d+)-of-(?P<of>\d+)\.safetensors$")


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
    Family(
        "SVDQuant (Nunchaku)",
        (".qweight", ".wscales"),
        "its 4-bit codes lie in the tile order of one CUDA kernel, beside low-rank branches. Only Nunchaku runs them; "
        "take the 16-bit model.",
    ),
    Family("GPTQ", (".qweight", ".qzeros", ".g_idx"), "its columns may be reordered by g_idx. Take the 16-bit model."),
    Family(
        "AWQ or GPTQ of transformers",
        (".qweight", ".qzeros", ".scales"),
        "its codes are packed eight to an int32 in an order that differs by writer. Take the 16-bit model.",
    ),
    Family(
        "NVFP4 of compressed-tensors",
        (".weight_packed", ".weight_global_scale"),
        "its global scale divides where NVFP4's multiplies, so no exact conversion exists. Take the 16-bit model.",
    ),
    Family("compressed-tensors", (".weight_packed",), "take the 16-bit model."),
    Family(
        "LLM.int8 of bitsandbytes",
        (".SCB",),
        "its scales are absmax values over 127, which round when they are divided. Take the 16-bit model.",
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
    Family("quanto", (".weight._data", ".weight._scale"), "take the 16-bit model."),
    Family("HQQ", (".W_q", ".zero", ".scale"), "take the 16-bit model."),
    Family(
        "MXFP4 of transformers",
        (".gate_up_proj_blocks", ".gate_up_proj_scales"),
        "its experts are packed together. Take the 16-bit model.",
    ),
)


def is_lora(src: Source) -> bool:
    """Whether all its tensors are factors of a LoRA or of its kin."""
    found = [lora_tensor(name) for name in src.tensors]
    known = all(one or _ADAPTER.search(name) for one, name in zip(found, src.tensors, strict=True))
    return known and any(one is None or one.kind is not Kind.ANY for one in found)


def part_of(src: Source) -> tuple[int, int] | None:
    """(number, of how many) for one shard of several that was given alone."""
    alone = _SHARD.search(src.path.name) if len(src.files) == 1 else None
    return None if alone is None or int(alone["of"]) < 2 else (int(alone["number"]), int(alone["of"]))


def recognise(src: Source) -> Family | None:
    """The foreign family the file belongs to; None for plain files, and for all that this pack reads."""
    for family in FAMILIES:
        if all(any(name.endswith(ending) for name in src.tensors) for ending in family.needs):
            return family
    return None


def refusal(src: Source) -> str | None:
    """Sentences that say what the file is and what to do; None when this pack can work with it."""
    if CALIBRATION_KEY in src.metadata:
        return (
            f"{src.path}: this file is a calibration: it holds what flows into a model's layers, and no weights. "
            "Give the model here, and this file as its calibration."
        )
    if is_lora(src):
        return (
            f"{src.path}: this file is a LoRA: it changes a model's weights and holds none of its own. Give the model "
            "here; `quantpress merge lora`, or the node Bake LoRA, puts the LoRA into it."
        )
    if (part := part_of(src)) is not None:
        return (
            f"{src.path}: this is shard {part[0]} of {part[1]}, a part of the model. Give the *{INDEX_SUFFIX} "
            "beside it, or the folder."
        )
    family = recognise(src)
    return None if family is None or family.plain else f"{src.path}: this file is {family.name}: {family.sentence}"
