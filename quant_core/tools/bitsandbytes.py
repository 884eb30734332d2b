"""NF4 and FP4 layers as bitsandbytes keeps them, and back. Importing is `migrate`; here is the way out.

The bytes equal those of bitsandbytes 0.50: a weight quantized by round-to-nearest and exported is what
`quantize_4bit` and `QuantState.as_dict(packed=True)` give, nested statistics included. Those are as its portable
kernel rounds them, to the nearest code; its CPU kernel first rounds to 65536 steps, and differs in about one code of a
thousand.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.source import Source
from ..errors import PlanError, RequestError, counted, some_of
from ..stored.bnb_state import STATE_PREFIX
from ..stored.form import Form
from ..stored.layers import StoredLayer, stored_layers
from .canonicalize import canonicalize
from .configs import HeaderMode, write_configs
from .rewrite import Draft, Rewrite

NESTED_BLOCK = 256
_SMALLEST = 1e-38
_LIBRARY_TYPES = ("nf4", "fp4")


def export_bitsandbytes(src: Source, *, nested: bool = False) -> Rewrite:
    """Every NF4, FP4 and AF4 layer in bitsandbytes' structure; codes and absmax stay as they are.

    nested: absmax is quantized to 8 bits in blocks of 256 as well, as `compress_statistics=True` does; that rounds.
    Layers in the structure already are left. Raises PlanError: a layer of another format; RequestError: no
    4-bit layer.
    """
    stored = stored_layers(src)
    if not stored:
        raise RequestError(f"{src.path}: nothing in it is quantized. Quantize it to bnb_nf4 or bnb_fp4 first.")
    other = [f"{layer} ({entry.format.name})" for layer, entry in stored.items() if not entry.format.quant_type]
    if other:
        raise PlanError(
            [
                f"{counted(len(other), 'layer is in a format', 'layers are in formats')} that "
                f"bitsandbytes has not: {some_of(other)}. Requantize them to "
                "bnb_nf4 or bnb_fp4 first."
            ]
        )
    draft = Draft(src)
    outside = {layer: entry for layer, entry in stored.items() if entry.form is not Form.BITSANDBYTES}
    for entry in outside.values():
        canonicalize(draft, entry)
        _export(draft, entry, nested)
    write_configs(draft, dict.fromkeys(outside), HeaderMode.DROP)
    foreign = [layer for layer, entry in stored.items() if entry.format.quant_type not in _LIBRARY_TYPES]
    if foreign:
        draft.notes.append(
            f"{counted(len(foreign), 'layer is', 'layers are')} AF4: this pack reads them, "
            "bitsandbytes itself has no such codebook."
        )
    return draft.finish()


def _export(draft: Draft, stored: StoredLayer, nested: bool) -> None:
    src, weight = draft.src, f"{stored.layer}.weight"
    (n, k), group_size = stored.shape, stored.format.group_size
    assert group_size is not None, stored.layer  # every codebook format has one
    draft.retype(weight, "U8", (n * k // 2, 1))
    draft.rename(f"{stored.layer}.weight_codebook", f"{weight}.quant_map")
    state: dict[str, Any] = {
        "quant_type": stored.format.quant_type,
        "blocksize": group_size,
        "dtype": str(stored.config.get("dtype", "bfloat16")),
        "shape": [n, k],
    }
    scales, name, count = f"{stored.layer}.weight_scale", f"{weight}.absmax", n * k // group_size
    draft.rename(scales, name)
    if nested:
        offset = _absmax(stored, src).mean()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset.item()}
        of = (stored.names["weight_scale"],)
        draft.make(name, "U8", (count,), lambda: quantize_absmax(_absmax(stored, src) - offset)[0], of=of)
        draft.make(
            f"{weight}.nested_absmax",
            "F32",
            (-(-count // NESTED_BLOCK),),
            lambda: quantize_absmax(_absmax(stored, src) - offset)[1],
            after=name,
            of=of,
        )
        draft.put(f"{weight}.nested_quant_map", dynamic_map(), after=name)
    elif draft.is_copy(name):
        draft.retype(name, "F32", (count,))
    else:
        draft.make(name, "F32", (count,), lambda: _absmax(stored, src), of=(stored.names["weight_scale"],))
    draft.put(
        f"{weight}.{STATE_PREFIX}{stored.format.quant_type}",
        torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8),
        after=weight,
    )


def _absmax(stored: StoredLayer, src: Source) -> Tensor:
    return stored.tensor(src, "weight_scale").reshape(-1)


def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, float32 ascending.

    For each power of ten 1e-6 .. 1 the middles of 1, 2, 4 .. 64 equal parts of [0.1, 1], with both signs; 0; and 1.
    Source: "8-bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561.
    """
    values = [0.0, 1.0]
    for step in range(7):
        edges = torch.linspace(0.1, 1, 2**step + 1, dtype=torch.float32)
        middles = (10 ** (step - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize_absmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [B] -> (codes uint8 [B] into dynamic_map, block scales float32 [ceil(B / 256)])."""
    book = dynamic_map()
    middles = (book[:-1] + book[1:]) / 2
    full = len(values) // NESTED_BLOCK * NESTED_BLOCK
    blocks = values[:full].reshape(-1, NESTED_BLOCK)
    scales = blocks.abs().amax(dim=1) if full else values.new_zeros(0)
    units = (blocks * scales.clamp(min=_SMALLEST).reciprocal()[:, None]).clamp(-1, 1).reshape(-1)
    if full < len(values):
        rest = values[full:]
        last = rest.abs().amax().clamp(min=_SMALLEST)
        scales, units = torch.cat((scales, last[None])), torch.cat((units, (rest / last).clamp(-1, 1)))
    return torch.bucketize(units, middles, out_int32=True).to(torch.uint8), scales
