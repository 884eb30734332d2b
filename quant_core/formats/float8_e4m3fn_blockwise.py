"""FP8 E4M3 with one scale per square tile of weights."""

from ..numerics.elements import E4M3
from ..numerics.scales import Granularity
from .families.plain import PlainFormat
from .records import Runtime

FORMAT = PlainFormat(
    name="float8_e4m3fn_blockwise",
    on_disk="float8_e4m3fn_blockwise",
    title="FP8 E4M3 per 2-D block",
    element=E4M3,
    granularity=Granularity.BLOCK,
    scale_rank="grid",
    records_group_size=True,
    group_size=128,
    group_sizes=(64, 128, 256),
    runtime=Runtime(
        "QuantPressFP8BlockwiseLayout", native_since=None, min_capability=(9, 0), quantizes_input=True, kernel="fp8"
    ),
    error_bound=16 / 448 + 1e-5,
    source="convert_to_quant's float8_e4m3fn_blockwise files",
)
