"""`input_scale`: by what a runtime divides a layer's inputs before it quantizes them, and which formats have one.

FP8: without one ComfyUI divides by 1, so inputs beyond the largest FP8 value saturate. NVFP4: without one it takes the
absmax of every call. Every other format of ComfyUI's ignores the tensor.
Source: comfy/ops.py (Linear.forward) and comfy/quant_ops.py (the layouts' quantize) of ComfyUI 0.29.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from ..errors import RequestError


class Absent(Enum):
    """What ComfyUI does without an input_scale."""

    ONE = "uses 1.0"
    DYNAMIC = "measures every call"


@dataclass(frozen=True, slots=True)
class InputScaleRule:
    """largest: the magnitude that an input_scale of 1 can represent."""

    largest: float
    absent: Absent

    def scale_for(self, magnitude: float) -> float:
        """The input_scale under which `magnitude` is the largest value represented; 1.0 where all inputs were 0."""
        if not math.isfinite(magnitude) or magnitude < 0:
            raise RequestError(f"the largest input is {magnitude}; a finite number >= 0 is needed. Capture again.")
        return magnitude / self.largest if magnitude > 0 else 1.0
