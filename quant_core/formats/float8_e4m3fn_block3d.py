"""FP8 E4M3 with one scale per row and group of input channels, stored as (N, K / group_size, 1)."""

from ..numerics.elements import E4M3
from ..numerics.scales import Granularity
from .families.plain import PlainFormat
from .records import Runtime

FORMAT = PlainFormat(
    name="float8_e4m3fn_block3d",
    on_disk="float8_e4m3fn_block3d",
    title="FP8 E4M3 per row group (block3d)",
    element=E4M3,
    granularity=Granularity.GROUP,
    scale_rank="grid3d",
    records_group_size=True,
    group_size=128,
    group_sizes=(64, 128, 256),
    runtime=Runtime(
        "QuantPressFP8Block3dLayout", native_since=None, min_capability=(8, 9), quantizes_input=True, kernel="fp8"
    ),
    error_bound=16 / 448 + 1e-5,
    source="convert_to_quant's float8_e4m3fn_block3d files",
)
