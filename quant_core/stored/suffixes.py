"""The last parts of the names of a quantized layer's tensors."""

from __future__ import annotations

from ..formats import weight_suffixes

DESCRIPTION = "comfy_quant"
# What a runtime takes for the layer's inputs, and hybrid_mxfp8's one more number. The weight decodes without them,
# but for pre_quant_scale, which multiplies it.
BESIDE_THE_WEIGHT = ("weight_scalar", "input_scale", "pre_quant_scale", DESCRIPTION)
# Everything that belongs to a quantized weight; `<layer>.bias` does not, it stays as it is.
QUANT_SUFFIXES = (*(suffix for suffix in weight_suffixes() if suffix not in BESIDE_THE_WEIGHT), *BESIDE_THE_WEIGHT)
