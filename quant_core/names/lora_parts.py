"""The tensors of a LoRA and of its kin: which layer each belongs to, and which part of the change it is.

Every tool has suffixes of its own for the same parts. Source: the tensors that kohya's scripts, diffusers, peft,
LyCORIS and the makers of models publish.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """How a change of weights is stored. The value is what users call it."""

    ANY = "any kind"  # a part that several kinds have
    LORA = "LoRA"
    LOHA = "LoHa"
    LOKR = "LoKr"
    GLORA = "GLoRA"
    OFT = "OFT"
    IA3 = "IA3"
    FULL = "full difference"


@dataclass(frozen=True, slots=True)
class LoraTensor:
    """base: the layer as the file names it. part: None when no ComfyUI reads a tensor of this name."""

    base: str
    kind: Kind
    part: str | None


# (the end of a name, kind, part); \1 is the first group. The first line that fits counts.
_ENDS = tuple(
    (re.compile(pattern + "$"), kind, part)
    for pattern, kind, part in (
        (r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?", Kind.LORA, None),  # peft's DoRA
        (r"\.lora_A(\.[^.]+)?\.bias", Kind.LORA, None),
        (r"\.lora_B(\.[^.]+)?\.bias", Kind.LORA, "up_bias"),
        (r"\.(dora_scale)", Kind.ANY, r"\1"),
        (r"(?:\.lora)?\.(alpha)", Kind.ANY, r"\1"),
        (r"\.lora_(mid)\.weight", Kind.LORA, r"\1"),
        (r"\.(reshape_weight)", Kind.LORA, r"\1"),
        (r"\.lora_(down|up)(?:\.weight)?", Kind.LORA, r"\1"),
        (r"\.lora_A(?:\.[^.]+)??(?:\.weight)?", Kind.LORA, "down"),  # peft puts the adapter's name between
        (r"\.lora_B(?:\.[^.]+)??(?:\.weight)?", Kind.LORA, "up"),
        (r"\.lora_linear_layer\.(down|up)\.weight", Kind.LORA, r"\1"),
        (r"[._]lora\.(down|up)\.weight", Kind.LORA, r"\1"),
        (r"\.hada_(w[12]_[ab]|t[12])", Kind.LOHA, r"\1"),
        (r"\.lokr_(w[12](?:_[ab])?|t2)", Kind.LOKR, r"\1"),
        (r"\.([ab][12])\.weight", Kind.GLORA, r"\1"),
        (r"\.bm\.weight", Kind.GLORA, None),
        (r"\.(oft_blocks|rescale)", Kind.OFT, r"\1"),
        (r"\.(oft_diag|oft_[rR](\.[^.]+)?(\.weight)?|boft_[rRs](\.[^.]+)?(\.weight)?)", Kind.OFT, None),
        (r"\.on_input", Kind.IA3, None),
        (r"\.(diff|diff_b|set_weight|w_norm|b_norm)", Kind.FULL, r"\1"),
    )
)
# USO's LoRAs of Flux: lora1 is of the image's branch, lora2 of the text's.
_NUMBERED = re.compile(r"^(.+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight$")


def lora_tensor(name: str) -> LoraTensor | None:
    """What a tensor of a LoRA is; None when its name does not end as a part of one does."""
    numbered = _NUMBERED.match(name)
    if numbered:
        block, layer, branch, part = numbered.groups()
        return LoraTensor(f"{block}.{layer}{branch}", Kind.LORA, part)
    for pattern, kind, part in _ENDS:
        match = pattern.search(name)
        if match and match.start():
            # diffusers' old attention processors: attn1.processor.to_q_lora.down.weight
            base = name[: match.start()].replace(".processor.", ".")
            return LoraTensor(base, kind, None if part is None else match.expand(part))
    return None
