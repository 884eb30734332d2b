"""FP8 E4M3, one scale for the whole tensor: the format every recent ComfyUI and GPU reads."""

from ..numerics.elements import E4M3
from ..numerics.scales import Granularity
from .families.plain import PlainFormat
from .input_scale import Absent, InputScaleRule
from .records import KernelLimits, Runtime

FORMAT = PlainFormat(
    name="float8_e4m3fn",
    on_disk="float8_e4m3fn",
    title="FP8 E4M3 per tensor",
    element=E4M3,
    granularity=Granularity.TENSOR,
    reciprocal=True,
    scale_rank="scalar",
    runtime=Runtime(
        "TensorCoreFP8E4M3Layout",
        native_since="0.8",
        min_capability=(8, 9),
        quantizes_input=True,
        input_scale=InputScaleRule(448.0, Absent.ONE),
        kitchen_layout="TensorCoreFP8Layout",
        # torch._scaled_mm: "must be divisible by 16"
        limits=KernelLimits(n_multiple=16, k_multiple=16, of_quantized_inputs=True),
    ),
    error_bound=16 / 448 + 1e-5,  # half the largest gap, 32 between 256 and 448
    source="OCP OFP8 v1.0; encoder: comfy-kitchen quantize_per_tensor_fp8 in float32",
)
