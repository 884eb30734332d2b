"""NF4: 4-bit NormalFloat codebook, absmax per 64 input channels, bytes as bitsandbytes writes them."""

from ..numerics.elements import NF4
from ..numerics.scales import Granularity
from .families.codebook import CodebookFormat
from .records import Runtime

FORMAT = CodebookFormat(
    name="bnb_nf4",
    on_disk="bnb_nf4",
    title="NF4 (bitsandbytes NormalFloat4)",
    quant_type="nf4",
    element=NF4,
    granularity=Granularity.GROUP,
    group_size=64,
    group_sizes=(32, 64, 128),
    signed_scales=True,
    runtime=Runtime("QuantPressNF4Layout", native_since=None, kernel="nibble"),
    error_bound=0.3038071990013123 / 2 + 1e-5,  # half the largest gap, between -1 and -0.696
    source="QLoRA, arXiv 2305.14314; bytes: bitsandbytes 0.50",
)
