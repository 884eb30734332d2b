"""The quantization state that bitsandbytes keeps beside a 4-bit weight: found, parsed, decoded.

`<layer>.weight` uint8 [N * K / 2, 1], high nibble first; `<layer>.weight.absmax` float32, one per block of the
flattened weight; `.quant_map` float32 [16]; `.quant_state.bitsandbytes__nf4` JSON bytes. With nested statistics
absmax is uint8 codes, and `.nested_absmax`, `.nested_quant_map` [256] and an offset in the JSON decode it.
Source: bitsandbytes 0.50, functional.QuantState.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.header import load_json_object
from ..checkpoint.source import Source
from ..errors import InputFileError

STATE_PREFIX = "quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
QUANT_TYPES = ("nf4", "fp4", "af4")


@dataclass(frozen=True, slots=True)
class BnbState:
    """names: {"weight", "quant_state", and of PARTS those there are: tensor name}. shape: of the weight, any rank.

    block_size: weights per absmax. nested_block_size: absmax values per nested_absmax; None when absmax is plain.
    """

    layer: str
    names: Mapping[str, str]
    quant_type: str
    block_size: int
    dtype: str
    shape: tuple[int, ...]
    nested_block_size: int | None
    nested_offset: float

    def absmax(self, src: Source) -> Tensor:
        """float32 [number of blocks]."""
        stored = src.read(self.names["absmax"]).reshape(-1)
        if self.nested_block_size is None:
            return stored.to(torch.float32)
        values = src.read(self.names["nested_quant_map"]).to(torch.float32)[stored.to(torch.int64)]
        scales = src.read(self.names["nested_absmax"]).to(torch.float32)
        per_value = scales.repeat_interleave(self.nested_block_size)[: len(values)]
        return values * per_value + self.nested_offset

    def decode(self, src: Source) -> Tensor:
        """float32, of `shape`: exactly what bitsandbytes computes before it casts to the weight's dtype."""
        packed = src.read(self.names["weight"]).view(torch.uint8).reshape(-1)
        codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[: prod(self.shape)]
        book = src.read(self.names["quant_map"]).to(torch.float32)
        scales = self.absmax(src).repeat_interleave(self.block_size)[: len(codes)]
        return (book[codes.to(torch.int32)] * scales).reshape(self.shape)


def bnb_states(src: Source) -> Iterator[BnbState]:
    """Every 4-bit layer with such a state. Raises InputFileError, naming the layer."""
    for name in src.tensors:
        owner, found, quant_type = name.partition("." + STATE_PREFIX)
        if not found:
            continue
        # bitsandbytes hangs the state under the weight, an older writer under the layer.
        layer = owner.removesuffix(".weight")
        names = {"weight": f"{layer}.weight", "quant_state": name}
        names |= {part: f"{owner}.{part}" for part in PARTS if f"{owner}.{part}" in src.tensors}
        yield _parse(src, layer, names, quant_type)


def _parse(src: Source, layer: str, names: dict[str, str], quant_type: str) -> BnbState:
    where = f"{src.path}: {layer}"
    missing = [part for part in ("weight", "absmax", "quant_map") if names.get(part) not in src.tensors]
    if missing:
        raise InputFileError(f"{where} has a bitsandbytes state and lacks {', '.join(missing)}. Take the file again.")
    text = src.read(names["quant_state"]).numpy().tobytes()
    state: dict[str, Any] = load_json_object(text, f"{where}: {names['quant_state']}")
    quant_type = str(state.get("quant_type", quant_type))
    block_size: Any = state.get("blocksize")
    shape: Any = state.get("shape")
    nested = state.get("nested_blocksize") if "nested_absmax" in names else None
    offset = state.get("nested_offset", 0.0)
    if (
        quant_type not in QUANT_TYPES
        or not _is_size(block_size)
        or not _is_shape(shape)
        or not (nested is None or _is_size(nested))
        or not isinstance(offset, int | float)
    ):
        raise InputFileError(
            f"{where}: the bitsandbytes state {state} is not one this pack reads (nf4 or fp4 with blocksize "
            "and shape). Take the unquantized model instead."
        )
    parsed = BnbState(
        layer,
        names,
        quant_type,
        block_size,
        str(state.get("dtype", "float32")),
        tuple(shape),
        nested,
        float(offset),
    )
    _check_sizes(src, where, parsed)
    return parsed


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and bool(shape) and all(_is_size(size) for size in shape)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _check_sizes(src: Source, where: str, state: BnbState) -> None:
    count = prod(state.shape)
    blocks = -(-count // state.block_size)
    needed = {"weight": (count + 1) // 2, "quant_map": 16, "absmax": blocks}
    if state.nested_block_size is not None:
        needed |= {"nested_absmax": -(-blocks // state.nested_block_size), "nested_quant_map": 256}
    for part, size in needed.items():
        name = state.names.get(part, part)
        found = prod(src.tensors[name].shape) if name in src.tensors else 0
        if part == "weight":
            found = src.tensors[name].nbytes  # quant_storage may be any dtype; the bytes are the same
        if found != size:
            raise InputFileError(
                f"{where}: {name} has {found} elements; a {list(state.shape)} weight in blocks of "
                f"{state.block_size} needs {size}. The file is damaged: take it from its source again."
            )
    if state.nested_block_size is None and src.tensors[state.names["absmax"]].dtype == "U8":
        raise InputFileError(f"{where}: absmax is uint8 (nested) and nested_absmax is missing. Take the file again.")
