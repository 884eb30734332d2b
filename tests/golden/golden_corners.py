"""The corner blocks of every format, each with what the value must be by the format's definition.

A weight is written as lines, one per row: values with a blank between them, `0*13` for thirteen zeros, `2^-10` for a
power of two, `0*16 | 15 rows` for fifteen equal rows. Scales are chosen to be 1 wherever that is possible, so that a
code can be read as the value that it stands for.
"""

from collections.abc import Callable
from dataclasses import dataclass

from comfyui_quantpress.quant_core.formats.base import Format
from comfyui_quantpress.quant_core.numerics.scales import Granularity


@dataclass(frozen=True)
class Corner:
    """name and why, for the reader. rows: the weight, as the module's docstring says. rotated: in the rotated basis,
    that is, the weight is the rotation of these rows, and its encoder sees exactly them."""

    name: str
    why: str
    rows: tuple[str, ...]
    rotated: bool = False


def variant(fmt: Format) -> Format:
    """The smallest options: the fewest bytes to read, and a rotation by 16, whose quarter steps are exact."""
    return fmt.with_options(
        min(fmt.group_sizes) if fmt.group_sizes else None, min(fmt.rotations) if fmt.rotations else None
    )


def corners(fmt: Format) -> list[Corner]:
    """Of this format (a `variant`); a format without corners of its own gets general ones, to be thought through."""
    return _OF_FORMAT.get(fmt.name, _general)(fmt)


# --- lines -----------------------------------------------------------------------------------------------------------


def _columns(fmt: Format) -> int:
    """Columns of one block: a group, or 8 where the rows are free."""
    return fmt.group_size or fmt.smallest_shape[1] if fmt.group_size or fmt.rotation else 8


def _line(values: str, columns: int) -> str:
    """The values, and zeros up to the end of the block."""
    count = sum(int(token.split("*")[1]) if "*" in token else 1 for token in values.split())
    return f"{values} 0*{columns - count}" if count < columns else values


def _block(fmt: Format, *blocks: str) -> tuple[str, ...]:
    """One row of blocks side by side, each with the values given in its first row."""
    columns = _columns(fmt)
    first = " ".join(_line(values, columns) for values in blocks)
    if fmt.granularity is Granularity.BLOCK:
        return first, f"0*{columns * len(blocks)} | {fmt.group_size - 1} rows"
    return (first,)


def _two_scales(fmt: Format, one: str, other: str) -> tuple[str, ...]:
    """Side by side where groups have scales; below each other where rows have (or share) them."""
    if fmt.granularity in (Granularity.TENSOR, Granularity.ROW):
        return _line(one, _columns(fmt)), _line(other, _columns(fmt))
    return _block(fmt, one, other)


# --- 8-bit floats ----------------------------------------------------------------------------------------------------


def _fp8_e4m3(fmt: Format) -> list[Corner]:
    shared = fmt.granularity is Granularity.TENSOR
    return [
        Corner("zeros", "The absmax is 0: by the zero policy the scale is 1 and every code is 00.", _block(fmt, "0")),
        Corner(
            "one outlier",
            "448 / 448: the scale is 1. 448 = 1.75 * 2^8 is 7e, the largest. 1 is 38 (exponent 7, mantissa 0), -1 is "
            "b8. 0.001 lies above 2^-10, the middle between 0 and the smallest subnormal 2^-9, and becomes 01.",
            _block(fmt, "448 1 -1 0.001"),
        ),
        Corner(
            "ties to even",
            "Scale 1. 1.0625 lies between 1 (38) and 1.125 (39): 38. 1.1875 between 39 and 1.25 (3a): 3a. -1.0625: "
            "b8. 432 between 416 (7d) and 448 (7e): 7e. 2^-10 between 0 (00) and 2^-9 (01): 00. 3 * 2^-10 between 01 "
            "and 02: 02.",
            _block(fmt, "448 1.0625 1.1875 -1.0625 432 2^-10 0.0029296875"),
        ),
        Corner(
            "both ends",
            "Scale 1. 448 is 7e and -448 is fe. 7f and ff are NaN and are never written. 447 is nearer to 448 than "
            "to 416.",
            _block(fmt, "-448 448 447"),
        ),
        Corner(
            "subnormal scale",
            "1e-29 / 448 lies below the scale floor 1e-30 (little-endian 6042a20d), which is taken instead. 1e-29 is "
            "10 of it: 1.25 * 2^3, exponent 10, mantissa 2: 52. -2^-126 is -1.2e-8 of it: -0, 80.",
            _block(fmt, "1e-29 -2^-126"),
        ),
        Corner("negative zero", "Scale 1. E4M3 has a -0, and a cast keeps the sign: 80.", _block(fmt, "448 -0")),
        Corner(
            "one scale for both rows" if shared else "two scales",
            "One scale for the tensor, 448 / 448 = 1: 7e 76, and 1 and 0.5 as they are: 38 30."
            if shared
            else "Each block has a scale of its own, 1 and 1 / 448 (little-endian 2549123b): 448 and "
            "224 of it, 7e 76, twice.",
            _two_scales(fmt, "448 224", "1 0.5"),
        ),
    ]


def _fp8_e5m2(fmt: Format) -> list[Corner]:
    return [
        Corner("zeros", "The absmax is 0: by the zero policy the scale is 1 and every code is 00.", _block(fmt, "0")),
        Corner(
            "one outlier",
            "57344 / 57344: the scale is 1. 57344 = 1.75 * 2^15 is 7b, the largest. 1 is 3c (exponent 15), -1 is bc. "
            "0.00001 lies above 2^-17, the middle between 0 and the smallest subnormal 2^-16, and becomes 01.",
            _block(fmt, "57344 1 -1 0.00001"),
        ),
        Corner(
            "ties to even",
            "Scale 1. 1.125 lies between 1 (3c) and 1.25 (3d): 3c. 1.375 between 3d and 1.5 (3e): 3e. -1.125: bc. "
            "53248 between 49152 (7a) and 57344 (7b): 7a. 2^-17 between 0 and 2^-16 (01): 00.",
            _block(fmt, "57344 1.125 1.375 -1.125 53248 2^-17"),
        ),
        Corner(
            "both ends",
            "Scale 1. 57344 is 7b and -57344 is fb. 7c and fc are infinite and are never written.",
            _block(fmt, "-57344 57344"),
        ),
        Corner(
            "subnormal scale",
            "1e-29 / 57344 lies below the scale floor 1e-30 (little-endian 6042a20d). 1e-29 is 10 of it: 1.25 * 2^3, "
            "exponent 18, mantissa 1: 49. -2^-126 is -1.2e-8 of it: -0, 80.",
            _block(fmt, "1e-29 -2^-126"),
        ),
        Corner("negative zero", "Scale 1. E5M2 has a -0, and a cast keeps the sign: 80.", _block(fmt, "57344 -0")),
        Corner(
            "one scale for both rows",
            "One scale for the tensor, 1: 7b 77, and 1 and 0.5 as they are: 3c 38.",
            _two_scales(fmt, "57344 28672", "1 0.5"),
        ),
    ]


def _mxfp8(fmt: Format) -> list[Corner]:
    return [
        Corner("zeros", "A block of zeros: exponent 00 (it decodes to scale 0) and codes 00.", _block(fmt, "0")),
        Corner(
            "one outlier",
            "448 / 448 = 1 is a power of two: exponent 127, 7f. The codes are the E4M3 codes of the weights, 7e 38 "
            "b8, and 01 for 0.001, which lies above 2^-10. Rows and columns up to 32 are padding: codes 00, "
            "exponents 00.",
            _block(fmt, "448 1 -1 0.001"),
        ),
        Corner(
            "scale rounded up",
            "449 / 448 lies above 1, and an E8M0 scale rounds up so that nothing saturates: 2, exponent 128, 80. 449 "
            "/ 2 = 224.5 lies between 224 (76) and 240 (77): 76. It decodes to 448.",
            _block(fmt, "449"),
        ),
        Corner(
            "ties to even",
            "Exponent 7f, scale 1. 1.0625 lies between 38 and 39: 38. 1.1875 between 39 and 3a: 3a. -1.0625: b8. 432 "
            "between 7d and 7e: 7e. 2^-10 between 00 and 01: 00.",
            _block(fmt, "448 1.0625 1.1875 -1.0625 432 2^-10"),
        ),
        Corner("both ends", "Scale 1. 448 is 7e and -448 is fe; 7f and ff are NaN.", _block(fmt, "-448 448")),
        Corner(
            "subnormal scale",
            "1e-29 / 448 lies below the floor 1e-30, which rounds up to 2^-99: exponent 28, 1c. 1e-29 is 6.34 of "
            "that, and E4M3 has 6 and 6.5 there: 6.5 = 1.625 * 2^2, exponent 9, mantissa 5: 4d.",
            _block(fmt, "1e-29"),
        ),
        Corner("negative zero", "Scale 1. E4M3 has a -0: 80.", _block(fmt, "448 -0")),
        Corner(
            "swizzled scales",
            "Exponents 7f and 7e in row 0, 7d and 7c in row 1. Row r, column c of a tile of 128 x 4 stands at byte "
            "(r % 32) * 16 + (r // 32) * 4 + c: bytes 0, 1, 16 and 17. Each block's largest is 448 of its scale, 7e.",
            (_line("448", 32) + " " + _line("224", 32), _line("112", 32) + " " + _line("56", 32)),
        ),
        Corner(
            "odd tail",
            "3 x 5 is padded with zeros to 32 x 32. Three rows with exponents 7f at bytes 0, 16 and 32; a row of "
            "padding has exponent 00.",
            ("448 1 2 4 8", "448 0*4", "448 -1 -2 -4 -8"),
        ),
    ]


def _nvfp4(fmt: Format) -> list[Corner]:
    top = _line("2688", 16)
    return [
        Corner(
            "zeros",
            "The tensor's absmax is 0: the scale of the tensor is the floor 1e-30 (little-endian 6042a20d), the "
            "block's is 0 and its codes are 0.",
            _block(fmt, "0"),
        ),
        Corner(
            "one outlier",
            "2688 = 448 * 6, so the tensor's scale is 1 (0000803f) and the block's 448 (7e). 2688 is 6 of it, code 7 "
            "in the HIGH nibble; -448 is -1 of it, code 10 (a): 7a. 100 is 0.22 of it and rounds to 0.",
            _block(fmt, "2688 -448 100"),
        ),
        Corner(
            "ties to even",
            "Block 0 makes the tensor's scale 1. Block 1 has the scale 6 / 6 = 1 (38). 0.25 lies between 0 and 0.5: "
            "0. 0.75: 1 (code 2). 1.25: 1 (2). 1.75: 2 (4). 2.5: 2 (4). 3.5: 4 (6). 5: 4 (6). -0.25: -0 (8). Bytes "
            "70 22 44 66 80.",
            (f"{top} {_line('6 0.25 0.75 1.25 1.75 2.5 3.5 5 -0.25', 16)}",),
        ),
        Corner(
            "saturation",
            "Block 1: 6.375 / 6 = 1.0625 lies between the E4M3 values 1 (38) and 1.125 (39) and goes to the even 38. "
            "Against the scale 1 as stored, 6.375 saturates at 6, code 7, and -6.375 at -6, code 15: 7f.",
            (f"{top} {_line('6.375 -6.375', 16)}",),
        ),
        Corner(
            "scale underflow",
            "Block 1: 6 * 2^-10 wants the scale 2^-10, the middle between 0 and the smallest E4M3 subnormal 2^-9; it "
            "goes to the even 00, and the block becomes zeros. Block 2: 6 * 2^-9 gets 01, and its largest is code 7.",
            (f"{top} {_line('0.005859375', 16)} {_line('0.01171875', 16)}",),
        ),
        Corner(
            "subnormal scale",
            "1e-29 / 2688 lies below the floor 1e-30, the tensor's scale. 1e-29 / 6 is 1.667 of it, between 1.625 "
            "(3d) and 1.75 (3e): 3d. 1e-29 is 6.15 of 1.625e-30: 6, code 7.",
            _block(fmt, "1e-29"),
        ),
        Corner(
            "negative zero", "E2M1 has a -0, code 8, in the low nibble of the first byte: 78.", _block(fmt, "2688 -0")
        ),
        Corner(
            "swizzled scales",
            "Block scales 448 (7e) and 224 (76) in row 0, 112 (6e) and 56 (66) in row 1. Row r, column c of a tile of "
            "128 x 4 stands at byte (r % 32) * 16 + (r // 32) * 4 + c: bytes 0, 1, 16 and 17.",
            (f"{top} {_line('1344', 16)}", f"{_line('672', 16)} {_line('336', 16)}"),
        ),
        Corner(
            "odd tail",
            "3 x 5 is padded with zeros to 16 x 16: three rows have a scale (bytes 0, 16 and 32), and the fifth "
            "weight is a high nibble whose neighbour is padding.",
            ("2688 448 896 1344 1792", "2688 0*4", "2688 -448 -896 -1344 -1792"),
        ),
    ]


# --- integers --------------------------------------------------------------------------------------------------------


def _int8(fmt: Format) -> list[Corner]:
    floored = fmt.on_disk == "int8_tensorwise"
    shared = fmt.granularity is Granularity.TENSOR
    return [
        Corner(
            "zeros",
            "The absmax is 0: the scale is the floor 1e-30 (little-endian 6042a20d), as comfy-kitchen writes it; "
            "codes 00."
            if floored
            else "The absmax is 0: by the zero policy the scale is 1 and every code is 00.",
            _block(fmt, "0"),
        ),
        Corner(
            "one outlier",
            "127 / 127: the scale is 1. 127 is 7f, 1 is 01, -1 is ff (two's complement), 0.4 rounds to 0.",
            _block(fmt, "127 1 -1 0.4"),
        ),
        Corner(
            "ties to even",
            "Scale 1. 0.5 goes to 0, 1.5 and 2.5 to 2, -0.5 to 0, -1.5 to -2 (fe), 126.5 to 126 (7e).",
            _block(fmt, "127 0.5 1.5 2.5 -0.5 -1.5 126.5"),
        ),
        Corner(
            "both ends",
            "Scale 1. 127 is 7f and -127 is 81. -128 (80) is never written: the grid is symmetric.",
            _block(fmt, "-127 127"),
        ),
        Corner(
            "subnormal scale",
            "1e-29 / 127 lies below the scale floor 1e-30 (little-endian 6042a20d). 1e-29 is 10 of it, 0a; -2^-126 "
            "is 0.",
            _block(fmt, "1e-29 -2^-126"),
        ),
        Corner("negative zero", "An integer has no -0: 00.", _block(fmt, "127 -0")),
        Corner(
            "one scale for both rows" if shared else "two scales",
            "One scale for the tensor, 1: 7f 3f, and 1 and 0.25 round to 01 and 00."
            if shared
            else "Each block has a scale of its own, 1 and 1 / 127 (little-endian 0402013c): 127 and 63 of the first, "
            "127 and 31.75 (32, 20) of the second.",
            _two_scales(fmt, "127 63", "1 0.25"),
        ),
    ]


def _int8_convrot(fmt: Format) -> list[Corner]:
    return [
        Corner(
            "zeros", "Zeros stay zeros when rotated: the scale floor 1e-30 (6042a20d), codes 00.", _block(fmt, "0")
        ),
        Corner(
            "one outlier is spread",
            "508 in column 0 becomes 508 / 4 = 127 in all 16, with the signs of the matrix's first row, (+ + + -) x "
            "(+ + + -): scale 1, codes 7f 7f 7f 81 three times, then their opposites 81 81 81 7f.",
            _block(fmt, "508"),
        ),
        Corner(
            "a constant row stays",
            "The matrix is regular, so each of its rows sums to 4, and 4 / 4 = 1: 127 stays 127, scale 1, codes 7f.",
            ("127*16",),
        ),
        Corner(
            "ties to even",
            "In the rotated basis 127 0.5 1.5 2.5 -0.5 -1.5 126.5, all exact: scale 1, codes 7f 00 02 02 00 fe 7e.",
            _block(fmt, "127 0.5 1.5 2.5 -0.5 -1.5 126.5"),
            rotated=True,
        ),
        Corner(
            "both ends",
            "In the rotated basis -127 127: scale 1, codes 81 7f. -128 (80) is never written.",
            _block(fmt, "-127 127"),
            rotated=True,
        ),
        Corner(
            "subnormal scale",
            "2^-100 / 127 lies below the floor 1e-30; in the rotated basis all are 2^-102 = 1.97e-31: 0.197 of it, "
            "codes 00.",
            _block(fmt, "2^-100"),
        ),
    ]


def _convrot_w4a4(fmt: Format) -> list[Corner]:
    return [
        Corner(
            "zeros",
            "A row of zeros has the absmax floor 1e-10: scale 1e-10 / 7 (little-endian 23517b2d); codes 0.",
            _block(fmt, "0"),
        ),
        Corner(
            "one outlier is spread",
            "28 in column 0 becomes 7 in the first 16 columns, signs (+ + + -) x (+ + + -). Scale 7 / 7 = 1. Low "
            "nibble first: +7 +7 is 77, +7 -7 is 97 (-7 is 9): 77 97 three times, then the opposite signs 99 79.",
            _block(fmt, "28"),
        ),
        Corner("a constant row stays", "Each row of the matrix sums to 1: 7 stays 7, scale 1, bytes 77.", ("7*64",)),
        Corner(
            "ties to even",
            "In the rotated basis 7 0.5 1.5 2.5 -0.5 -1.5: scale 1, codes 7 0 2 2 0 -2 (e). Bytes, low nibble first: "
            "07 22 e0.",
            _block(fmt, "7 0.5 1.5 2.5 -0.5 -1.5"),
            rotated=True,
        ),
        Corner(
            "both ends",
            "In the rotated basis -7 7: codes 9 and 7, byte 79. -8 (8) is never written.",
            _block(fmt, "-7 7"),
            rotated=True,
        ),
        Corner(
            "two scales",
            "One scale per row: 1 and 0.25 (0000803e). Both rows have the same codes.",
            ("7*64", "1.75*64"),
        ),
    ]


# --- codebooks -------------------------------------------------------------------------------------------------------


def _nf4(fmt: Format) -> list[Corner]:
    return _codebook(fmt, "0.03979014977812767", "-0.045525018125772476")


def _af4(fmt: Format) -> list[Corner]:
    return _codebook(fmt, "0.0401652", "-0.0459768")


def _codebook(fmt: Format, middle_above: str, middle_below: str) -> list[Corner]:
    return [
        Corner("zeros", "The absmax is 0 and is stored as it is; 0 is code 7: bytes 77.", _block(fmt, "0")),
        Corner(
            "one outlier",
            "The stored scale is the absmax itself, 8 (00000041). 8 is level 1, code f; -8 is level -1, code 0; 4 is "
            "level 0.5, nearest code 12 (c); 0 is code 7. High nibble first: f0 c7.",
            _block(fmt, "8 -8 4 0"),
        ),
        Corner(
            "ties",
            "Scale 1. The middle between level 0 (7) and the next above, and the middle between the next below (6) "
            "and 0: each goes to the lower level, 7 and 6. High nibble first: f7 67.",
            _block(fmt, f"1 {middle_above} {middle_below}"),
        ),
        Corner(
            "subnormal scale",
            "2^-130 is stored as it is, a subnormal float32. The division takes no less than 1e-38 (as bitsandbytes "
            "does): 2^-130 is 0.073 of that, code 8, and -2^-130 is code 6. High nibble first: 86.",
            _block(fmt, "2^-130 -2^-130"),
        ),
        Corner("negative zero", "A codebook has no -0: code 7, byte f7.", _block(fmt, "1 -0")),
        Corner(
            "two scales",
            "Each group has its absmax: 1 (0000803f) and 0.25 (0000803e); both have the levels 1 and -1, byte f0.",
            _block(fmt, "1 -1", "0.25 -0.25"),
        ),
    ]


def _fp4(fmt: Format) -> list[Corner]:
    return [
        Corner(
            "zeros",
            "The absmax is 0 and is stored as it is. The table has two zeros, codes 0 and 8, and the bound between "
            "them is 0: what is not above it is the lower rank, code 0.",
            _block(fmt, "0"),
        ),
        Corner(
            "one outlier",
            "The stored scale is the absmax itself, 12 (00004041), so weights read as twelfths: 12 is code 3, -12 "
            "code 11 (b), 6 code 5, 3 code 7, 8 code 2, 4 code 4, 2 code 6, 0.0625 code 1. High nibble first: 3b 57 "
            "24 61.",
            _block(fmt, "12 -12 6 3 8 4 2 0.0625"),
        ),
        Corner(
            "ties",
            "Scale 12. 10, the middle of 8 (code 2) and 12 (3), goes to the lower 8: 2. -10 goes to the lower -12: "
            "b. 5 to 4 (code 4), -5 to -6 (d). High nibble first: 32 b4 d0.",
            _block(fmt, "12 10 -10 5 -5"),
        ),
        Corner(
            "tiny weights",
            "Above 0 and below half of the smallest level: the upper of the two zeros, code 8, as bitsandbytes "
            "writes it. Below 0: code 0. High nibble first: 38 00.",
            _block(fmt, "12 0.001 -0.001"),
        ),
        Corner(
            "subnormal scale",
            "2^-130 is stored as it is. The division takes no less than 1e-38: 2^-130 is 0.073 of that, 0.88 "
            "twelfths, nearer to 0.0625 (code 1) than to 2; its negative is code 9. High nibble first: 19.",
            _block(fmt, "2^-130 -2^-130"),
        ),
        Corner("negative zero", "-0 is not above 0: code 0, byte 30.", _block(fmt, "12 -0")),
        Corner(
            "two scales",
            "Each group has its absmax: 12 and 3 (00004040); both have the levels 1 and -1, byte 3b.",
            _block(fmt, "12 -12", "3 -3"),
        ),
    ]


def _awq(fmt: Format) -> list[Corner]:
    ramp = " ".join(map(str, range(16)))
    return [
        Corner(
            "zeros",
            "The scale is the floor 1e-30 in bf16 (a20d). The zero point is half a step (220d), to centre the 16 "
            "codes. 0 is -0.5 step from it, the middle of two codes, and goes to the lower, 7: it decodes to -5e-31.",
            _block(fmt, "0"),
        ),
        Corner(
            "a constant group",
            "3 everywhere: scale 1e-30, zero point 3 (4040 as a little-endian bf16), 3 - 3 = 0 is code 8: bytes 88.",
            ("3*32",),
        ),
        Corner(
            "ramp",
            "0 .. 15: scale 15 / 15 = 1 (803f), zero point 0 + 7.5 + 0.5 = 8 (0041), so every weight is its own "
            "code. Low nibble first: 10 32 54 76 98 ba dc fe.",
            (f"{ramp} {ramp}",),
        ),
        Corner(
            "ties",
            "Scale 1, zero point 8. 0.5 lies between codes 0 and 1, 1.5 between 1 and 2, 14.5 between 14 and 15: "
            "each goes to the lower. Codes 0 15 0 1 14, low nibble first: f0 10 0e.",
            _block(fmt, "0 15 0.5 1.5 14.5"),
        ),
        Corner(
            "saturation",
            "15.05 / 15 = 1.0033 rounds to 1 in bf16, and the zero point 8.025 to 8. 15.05 - 8 = 7.05 saturates at "
            "code 15, which decodes to 15.",
            _block(fmt, "0 15.05"),
        ),
        Corner(
            "signed zero point",
            "-15 .. 0: scale 1, zero point -7.5 + 0.5 = -7 (e0c0). -15 + 7 = -8 is code 0, 0 + 7 is code 15. Bytes "
            "f0, ff.",
            _block(fmt, "-15 0"),
        ),
        Corner(
            "two scales, transposed",
            "Groups lie along the FIRST axis of the stored scales, [K / 32, N]: scales 1 2 / 4 8, written group by "
            "group: 803f 8040 / 0040 0041 for rows 0 and 1. Each group is 0 and its largest weight: codes 0 and 15.",
            (_line("0 15", 32) + " " + _line("0 30", 32), _line("0 60", 32) + " " + _line("0 120", 32)),
        ),
        Corner("negative zero", "Scale 1, zero point 8: -0 - 8 = -8 is code 0.", _block(fmt, "15 -0")),
    ]


def _asym_w4a8(fmt: Format) -> list[Corner]:
    return [
        Corner(
            "zeros",
            "Every floor is 1e-8: channel scale 1e-8 (77cc2b32), relative scale 1 (38). The int8 levels are the "
            "table rounded, -1 or 0 or 1; the first that is 0 is code 4: bytes 44. It decodes to 0.",
            _block(fmt, "0"),
        ),
        Corner(
            "a constant row stays",
            "Rotated 1 stays 1: code 15 (level 0.980671), least-squares scale 1 / 0.980671, so the channel scale is "
            "1 / 127 (0402013c) and the relative one 129.5, E4M3 128 (70). Level 15 is round(125.5) = 126: decodes "
            "to 126 / 127.",
            ("1*16",),
        ),
        Corner(
            "one outlier is spread",
            "4 in column 0 becomes 1 in all 16, signs (+ + + -) x (+ + + -): codes 15 and 0. Low nibble first: ff 0f "
            "three times, then 00 f0. The channel scale is an ulp or more above 1 / 127, because level 0 is not "
            "minus level 15.",
            _block(fmt, "4"),
        ),
        Corner(
            "two group scales",
            "Rotated 1 in group 0 and 0.25 in group 1: one channel scale 1 / 127, relative scales 128 (70) and a "
            "quarter, 32 (60): 129.5 / 4 = 32.4. Level 15 of group 1 is round(31.4) = 31. All codes 15.",
            ("1*16 0.25*16",),
        ),
        Corner(
            "two channel scales",
            "One float32 per row: 1 / 127 and 1 / 508 (0402013b). Both rows have the same relative scale and codes.",
            ("1*16", "0.25*16"),
        ),
    ]


def _general(fmt: Format) -> list[Corner]:
    """For a format that has none here yet: think each through by the definition, and add them to _OF_FORMAT."""
    top = f"{fmt.element.max:g}"
    why = "Not thought through yet: say here what the bytes must be by the format's definition."
    return [
        Corner("zeros", f"{why} Its zero policy: {fmt.zero_policy}.", _block(fmt, "0")),
        Corner("one outlier", why, _block(fmt, f"{top} 1 -1 0.001")),
        Corner("both ends", why, _block(fmt, f"-{top} {top}")),
        Corner("subnormal scale", why, _block(fmt, "1e-29 -2^-126")),
        Corner("negative zero", why, _block(fmt, f"{top} -0")),
        Corner("two scales", why, _two_scales(fmt, f"{top} 1", "1 0.5")),
    ]


_OF_FORMAT: dict[str, Callable[[Format], list[Corner]]] = {
    "float8_e4m3fn": _fp8_e4m3,
    "float8_e5m2": _fp8_e5m2,
    "float8_e4m3fn_rowwise": _fp8_e4m3,
    "float8_e4m3fn_blockwise": _fp8_e4m3,
    "float8_e4m3fn_block3d": _fp8_e4m3,
    "int8_tensorwise": _int8,
    "int8_rowwise": _int8,
    "int8_convrot": _int8_convrot,
    "int8_blockwise": _int8,
    "int8_lodewise": _int8,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "convrot_w4a4": _convrot_w4a4,
    "asym_w4a8_int8": _asym_w4a8,
    "awq_w4a16": _awq,
    "bnb_nf4": _nf4,
    "bnb_fp4": _fp4,
    "bnb_af4": _af4,
}
