"""INT8, one scale for the whole tensor."""

from dataclasses import dataclass

from torch import Tensor

from ..numerics.elements import INT8
from ..numerics.scales import SCALE_FLOOR, Granularity, QParams
from .families.plain import PlainFormat
from .records import KernelLimits, Runtime


@dataclass(frozen=True, kw_only=True)
class Int8TensorwiseFamily(PlainFormat):
    """The variants of ComfyUI's `int8_tensorwise`. A block of zeros gets the scale 1e-30, as in comfy-kitchen."""

    def qparams(self, effective: Tensor, like: QParams | None = None) -> QParams:
        return QParams(effective.clamp(min=SCALE_FLOOR))


INT8_RUNTIME = Runtime(
    "TensorWiseINT8Layout",
    native_since="0.29",
    min_capability=(7, 5),
    quantizes_input=True,
    # comfy-kitchen 0.2.40: "INT8 GEMM not supported on this GPU for these dimensions", whatever the number of rows
    limits=KernelLimits(k_multiple=4),
)
INT8_SOURCE = "comfy-kitchen TensorWiseINT8Layout, eager encoders in float32"

FORMAT = Int8TensorwiseFamily(
    name="int8_tensorwise",
    on_disk="int8_tensorwise",
    title="INT8 per tensor",
    element=INT8,
    granularity=Granularity.TENSOR,
    scale_rank="scalar",
    runtime=INT8_RUNTIME,
    error_bound=0.5 / 127 + 1e-5,
    source=INT8_SOURCE,
)
