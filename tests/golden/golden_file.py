"""Golden files: what they hold, and how a weight and its stored bytes are written so that a person can check them.

One file per format. `blocks`: corners with a `why`; `random`: one block of seeded weights;
`whole`: the first codes and a hash of a weight of 64 x 256. Bytes are hex, element by element, little-endian,
`00*13` for thirteen equal elements, one line per row of the tensor.

To add a corner, write a block with `name`, `why`, `weight`, `tensors` {} and `decoded` []. The test then fails, and
its message is the whole block. Check it against the `why`, and put it into the file.
"""

import hashlib
import json
import random
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from comfyui_quantpress.quant_core.formats.base import Format
from comfyui_quantpress.quant_core.numerics.hadamard import rotate_columns
from golden_corners import Corner, general_corners, variant
from torch import Tensor

FOLDER = Path(__file__).parent
RANDOM_SEED = 0


def golden_path(fmt: Format) -> Path:
    return FOLDER / f"{fmt.name}.json"


def command(fmt: Format) -> str:
    return f"python -m tests.golden --format {fmt.name}"


# --- notation --------------------------------------------------------------------------------------------------------


def number(text: str) -> float:
    """'0.5', '1e-29', '-2^-126' -> float."""
    power = re.fullmatch(r"(-?)2\^(-?\d+)", text)
    return float(text) if power is None else (-1.0 if power[1] else 1.0) * 2.0 ** int(power[2])


def parse_rows(lines: list[str] | tuple[str, ...]) -> Tensor:
    """Lines as in golden_corners.py -> float32 [N, K]."""
    rows = []
    for line in lines:
        text, _, repeat = line.partition(" | ")
        row = []
        for value, _, count in split_runs(text):
            row += [number(value)] * int(count or 1)
        rows += [row] * (int(repeat.removesuffix(" rows")) if repeat else 1)
    return torch.tensor(rows, dtype=torch.float32)


def runs(items: list[str]) -> str:
    """Items with a blank between them; two and more equal ones as `item*count`."""
    counted = [(item, len(list(same))) for item, same in groupby(items)]
    return " ".join(item if count == 1 else f"{item}*{count}" for item, count in counted)


def equal_rows(lines: list[str]) -> list[str]:
    counted = [(line, len(list(same))) for line, same in groupby(lines)]
    return [line if count == 1 else f"{line} | {count} rows" for line, count in counted]


def read_bytes(entry: dict[str, Any]) -> Tensor:
    """The inverse of write_bytes."""
    name, _, shape = entry["of"].partition(" ")
    raw = bytearray()
    for line in entry["hex"]:
        text, _, repeat = line.partition(" | ")
        row = b"".join(bytes.fromhex(item) * int(count or 1) for item, _, count in split_runs(text))
        raw += row * (int(repeat.removesuffix(" rows")) if repeat else 1)
    return torch.frombuffer(raw, dtype=torch.uint8).view(getattr(torch, name)).view(json.loads(shape))


def split_runs(line: str) -> list[tuple[str, str, str]]:
    return [token.partition("*") for token in line.split()]


def write_rows(values: Tensor) -> list[str]:
    """The inverse of parse_rows. Numbers in the shortest form that reads back as the same float32."""
    return equal_rows([runs([str(value).removesuffix(".0") for value in row]) for row in values.numpy()])


def write_bytes(tensor: Tensor) -> dict[str, Any]:
    """{"of": dtype and shape, "hex": lines}."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)
    size = tensor.element_size()
    raw = [row.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes().hex() for row in rows]
    lines = [runs([line[i : i + 2 * size] for i in range(0, len(line), 2 * size)]) for line in raw]
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"of": f"{dtype} {list(tensor.shape)}", "hex": equal_rows(lines)}


# --- what is compared ------------------------------------------------------------------------------------------------


def corner_weight(fmt: Format, corner: Corner) -> Tensor:
    weight = parse_rows(corner.rows)
    return rotate_columns(weight, fmt.rotation) if corner.rotated else weight


def random_weight(fmt: Format) -> Tensor:
    """Two rows (or one tile) of multiples of 2^-20 below 1 / 16: their sums, and so rotations by 16, are exact."""
    rows, columns = fmt.smallest_shape
    shape = (max(rows, 2), columns if columns > 8 else 32)
    draw = random.Random(RANDOM_SEED).random  # the only generator whose sequence Python promises to keep
    values = [int((draw() - 0.5) * 2**17) / 2**20 for _ in range(shape[0] * shape[1])]
    return torch.tensor(values, dtype=torch.float32).view(shape)


def whole_weight() -> Tensor:
    k = torch.arange(64 * 256, dtype=torch.float64)
    return (torch.sin(k * 0.7) * (1 + (k % 37) / 9) * 0.01).float().view(64, 256)


def digest(fmt: Format) -> dict[str, Any]:
    """Of the whole weight, in groups of 64 where the format offers them."""
    fmt = fmt.with_options(group_size=64) if 64 in fmt.group_sizes else fmt
    tensors = fmt.quantize(whole_weight())
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    first = tensors["weight"].view(torch.uint8)[0, :8].tolist()
    return {"first_codes": " ".join(f"{code:02x}" for code in first), "sha256": h.hexdigest()[:16]}


def stored(fmt: Format, weight: Tensor) -> tuple[dict[str, Any], list[str]]:
    """(tensors as written, decoded rows). The rows are without padding, and in the rotated basis if there is one."""
    tensors = fmt.quantize(weight)
    decoded = fmt.decode(*fmt.unpack(tensors, tuple(weight.shape)))[: weight.shape[0], : weight.shape[1]]
    written = {suffix: write_bytes(tensor) for suffix, tensor in tensors.items()}
    return written, write_rows(decoded + 0.0)  # no -0: rotating loses its sign


def kept_corners(kept: dict[str, Any]) -> list[Corner]:
    """The corners of a golden file."""
    return [
        Corner(block["name"], block["why"], tuple(block[where]), rotated=where == "weight, rotated")
        for block in kept["blocks"]
        for where in ("weight", "weight, rotated")
        if where in block
    ]


def golden(registered: Format, corners: list[Corner]) -> dict[str, Any]:
    """The whole file with these corners, by today's code."""
    fmt = variant(registered)
    blocks = []
    for corner in corners:
        where = "weight, rotated" if corner.rotated else "weight"
        tensors, decoded = stored(fmt, corner_weight(fmt, corner))
        entry = {"name": corner.name, "why": corner.why, where: list(corner.rows)}
        blocks.append({**entry, "tensors": tensors, "decoded": decoded})
    drawn = random_weight(fmt)
    return {
        "format": registered.name,
        "group_size": fmt.group_size,
        "rotation": fmt.rotation,
        "blocks": blocks,
        "random": {"seed": RANDOM_SEED, "shape": str(list(drawn.shape)), "tensors": stored(fmt, drawn)[0]},
        "whole": digest(registered),
    }


def file_text(value: Any, indent: int = 0) -> str:
    """JSON, in which a list or an object stands on one line where that is short enough to be read."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, list | dict) or (indent and len(line) + indent <= 119):
        return line
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {file_text(entry, indent + 1)}" for key, entry in value.items()]
    else:
        items = [file_text(entry, indent + 1) for entry in value]
    blank, (first, last) = " " * indent, "{}" if isinstance(value, dict) else "[]"
    return f"{first}\n{blank} " + f",\n{blank} ".join(items) + f"\n{blank}{last}"


def write(fmt: Format) -> Path:
    """FileExistsError when there is a file: a golden changes by hand, with a reason, and is never overwritten."""
    path = golden_path(fmt)
    if path.exists():
        raise FileExistsError(path)
    text = (
        file_text(golden(fmt, general_corners(variant(fmt)))) + "\n"
    )  # before the file is made: an encoder that fails leaves no empty file
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    return path
