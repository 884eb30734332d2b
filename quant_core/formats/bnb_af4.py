"""AF4: the L1-optimal 4-bit codebook for blocks of 64 normal weights, absmax per 64 input channels."""

from ..numerics.elements import CodebookElement
from ..numerics.scales import Granularity
from .families.codebook import CodebookFormat
from .records import Runtime

# Printed by bench/rounding/derive_af4.py, which explains how it relates to the table published with arXiv 2306.06965.
AF4 = CodebookElement(
    "af4",
    (
        -1.0,
        -0.7101467,
        -0.5348234,
        -0.4010656,
        -0.2881267,
        -0.1868169,
        -0.0919536,
        0.0,
        0.0803304,
        0.1625862,
        0.2490011,
        0.3425639,
        0.4478749,
        0.5732073,
        0.7369697,
        1.0,
    ),
)

FORMAT = CodebookFormat(
    name="bnb_af4",
    on_disk="bnb_af4",
    title="AF4 (AbnormalFloat4)",
    quant_type="af4",
    element=AF4,
    granularity=Granularity.GROUP,
    group_size=64,
    group_sizes=(32, 64, 128),
    signed_scales=True,
    runtime=Runtime("QuantPressAF4Layout", native_since=None, kernel="nibble"),
    error_bound=0.2898533 / 2 + 1e-5,  # half the largest gap, between -1 and -0.710
    source="objective: arXiv 2306.06965; table: bench/rounding/derive_af4.py; structure: bitsandbytes",
)
