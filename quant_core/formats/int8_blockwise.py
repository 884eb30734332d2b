"""INT8 with one scale per square tile of weights."""

from ..numerics.elements import INT8
from ..numerics.scales import Granularity
from .families.plain import PlainFormat
from .records import Runtime

FORMAT = PlainFormat(
    name="int8_blockwise",
    on_disk="int8_blockwise",
    title="INT8 per 2-D block",
    element=INT8,
    granularity=Granularity.BLOCK,
    scale_rank="grid",
    records_group_size=True,
    unit_input_scale=True,
    group_size=128,
    group_sizes=(64, 128, 256),
    runtime=Runtime(
        "QuantPressINT8BlockwiseLayout", native_since=None, min_capability=(7, 5), quantizes_input=True, kernel="int8"
    ),
    error_bound=0.5 / 127 + 1e-5,
    source="convert_to_quant's int8_blockwise files",
)
