"""FP8 E5M2, one scale for the whole tensor: more range, one mantissa bit less. Weights rarely gain by it."""

from ..numerics.elements import E5M2
from ..numerics.scales import Granularity
from .families.plain import PlainFormat
from .input_scale import Absent, InputScaleRule
from .records import KernelLimits, Runtime

FORMAT = PlainFormat(
    name="float8_e5m2",
    on_disk="float8_e5m2",
    title="FP8 E5M2 per tensor",
    element=E5M2,
    granularity=Granularity.TENSOR,
    reciprocal=True,
    scale_rank="scalar",
    runtime=Runtime(
        "TensorCoreFP8E5M2Layout",
        native_since="0.8",
        min_capability=(8, 9),
        quantizes_input=True,
        input_scale=InputScaleRule(57344.0, Absent.ONE),
        kitchen_layout="TensorCoreFP8Layout",
        # torch._scaled_mm: "must be divisible by 16"
        limits=KernelLimits(n_multiple=16, k_multiple=16, of_quantized_inputs=True),
    ),
    error_bound=4096 / 57344 + 1e-5,  # half the largest gap, 8192 between 32768 and 57344
    source="OCP OFP8 v1.0; encoder: comfy-kitchen quantize_per_tensor_fp8 in float32",
)
