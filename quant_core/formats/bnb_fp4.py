"""FP4: bitsandbytes' 4-bit float codebook, absmax per 64 input channels."""

from ..numerics.elements import FP4
from ..numerics.scales import Granularity
from .families.codebook import CodebookFormat
from .records import Runtime

FORMAT = CodebookFormat(
    name="bnb_fp4",
    on_disk="bnb_fp4",
    title="FP4 (bitsandbytes)",
    quant_type="fp4",
    element=FP4,
    granularity=Granularity.GROUP,
    group_size=64,
    group_sizes=(32, 64, 128),
    runtime=Runtime("QuantPressFP4Layout", native_since=None, kernel="nibble"),
    error_bound=4 / 12 / 2 + 1e-5,  # half the largest gap, between 8/12 and 1
    source="bitsandbytes 0.50",
)
