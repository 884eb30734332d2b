"""INT8 with one scale per row and group of input channels."""

from ..numerics.elements import INT8
from ..numerics.scales import Granularity
from .families.plain import PlainFormat
from .records import Runtime

FORMAT = PlainFormat(
    name="int8_lodewise",
    on_disk="int8_lodewise",
    title="INT8 per row group (lodewise)",
    element=INT8,
    granularity=Granularity.GROUP,
    scale_rank="grid",
    records_group_size=True,
    group_size=128,
    group_sizes=(64, 128, 256),
    runtime=Runtime(
        "QuantPressINT8LodewiseLayout", native_since=None, min_capability=(7, 5), quantizes_input=True, kernel="int8"
    ),
    error_bound=0.5 / 127 + 1e-5,
    source="convert_to_quant's int8_lodewise files",
)
