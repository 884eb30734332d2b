"""One file per format. Importing this package registers them all, in the order of the documentation."""

# ruff: noqa: I001
from . import (  # noqa: F401  imported for registration; the order is the order of every table
    float8_e4m3fn,
    float8_e5m2,
    float8_e4m3fn_rowwise,
    float8_e4m3fn_blockwise,
    float8_e4m3fn_block3d,
    int8_tensorwise,
    int8_rowwise,
    int8_convrot,
    int8_blockwise,
    int8_lodewise,
    mxfp8,
    nvfp4,
    convrot_w4a4,
    asym_w4a8_int8,
    awq_w4a16,
    bnb_nf4,
    bnb_fp4,
    bnb_af4,
)
