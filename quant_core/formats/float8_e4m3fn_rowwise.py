"""FP8 E4M3 with one scale per output channel."""

from ..numerics.elements import E4M3
from ..numerics.scales import Granularity
from .families.plain import PlainFormat
from .records import Runtime

FORMAT = PlainFormat(
    name="float8_e4m3fn_rowwise",
    on_disk="float8_e4m3fn_rowwise",
    title="FP8 E4M3 per row",
    element=E4M3,
    granularity=Granularity.ROW,
    scale_rank="vector",
    runtime=Runtime(
        "QuantPressFP8RowwiseLayout", native_since=None, min_capability=(8, 9), quantizes_input=True, kernel="fp8"
    ),
    error_bound=16 / 448 + 1e-5,
    source="convert_to_quant's float8_e4m3fn_rowwise files",
)
