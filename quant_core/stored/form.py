"""The forms in which quantized layers stand in files."""

from __future__ import annotations

from enum import Enum


class Form(Enum):
    """How a file holds a quantized layer. The value is its name in reports."""

    COMFY_QUANT = "comfy_quant"  # what this pack writes
    COMFY_4BIT = "comfy_4bit"  # comfy_quant with `<layer>.absmax`, as NF4, FP4 and AF4 once were
    HYBRID_MXFP8 = "hybrid_mxfp8"  # comfy_quant MXFP8 with one more number, for GPUs without block scaling
    LEGACY = "legacy"  # fp8_scaled: scale_weight and scale_input
    BARE = "bare"  # the scales of comfy_quant, and no description
    OTHER_NAME = "other_name"  # as bare, and the scale has a name of another program's
    MODELOPT = "modelopt"  # NVIDIA ModelOpt's order of nibbles and block scales
    BITSANDBYTES = "bitsandbytes"  # a quantization state beside the weight

    @property
    def described(self) -> bool:
        """Whether the file has a comfy_quant description of the layer."""
        return self in (Form.COMFY_QUANT, Form.COMFY_4BIT, Form.HYBRID_MXFP8)
