"""The corner blocks that a new golden file begins with. Those of a format that has a file stand in the file.

A weight is written as lines, one per row: values with a blank between them, `0*13` for thirteen zeros, `2^-10` for a
power of two, `0*16 | 15 rows` for fifteen equal rows. Scales are chosen to be 1 wherever that is possible, so that a
code can be read as the value that it stands for.
"""

from dataclasses import dataclass, replace

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
    """The smallest options: the fewest bytes to read, and a rotation by 16, whose quarter steps are exact.

    Files may hold a rotation or a group size that is not offered for new ones.
    """
    size = 32 if fmt.group_size == 64 else min(fmt.group_sizes, default=fmt.group_size)
    small = replace(fmt, group_size=size)
    return replace(small, rotation=16) if fmt.rotation is not None else small


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


def general_corners(fmt: Format) -> list[Corner]:
    """For a new format (a `variant`). Think each through by the definition, and write its `why` in the golden file."""
    top = f"{fmt.element.max:g}"
    why = "Not thought through yet: say here what the bytes must be by the format's definition."
    return [
        Corner("zeros", why, _block(fmt, "0")),
        Corner("one outlier", why, _block(fmt, f"{top} 1 -1 0.001")),
        Corner("both ends", why, _block(fmt, f"-{top} {top}")),
        Corner("subnormal scale", why, _block(fmt, "1e-29 -2^-126")),
        Corner("negative zero", why, _block(fmt, f"{top} -0")),
        Corner("two scales", why, _two_scales(fmt, f"{top} 1", "1 0.5")),
    ]
