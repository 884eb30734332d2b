"""One stored layer in a draft, turned into the tensors that this pack writes."""

from __future__ import annotations

from enum import Enum

import torch

from ..checkpoint.header import TORCH_TO_CODE
from ..formats.records import TensorSpec
from ..stored.canonical import is_fp8
from ..stored.fit import Step
from ..stored.layers import StoredLayer
from .rewrite import Draft


class InputScale(Enum):
    """What an FP8 layer without an input_scale gets."""

    KEEP = "keep"  # none
    UNIT = "unit"  # 1.0
    WEIGHT = "weight"  # the weight's own scale, as text encoders had it


def canonicalize(draft: Draft, stored: StoredLayer, input_scale: InputScale = InputScale.KEEP) -> None:
    """Rename, retype or compute the layer's tensors in the draft. Where only names, dtypes or ranks differ, bytes are
    copied. `comfy_quant` is left to write_configs."""
    written = {"input_scale", "pre_quant_scale", "comfy_quant"}
    for spec in stored.format.tensor_specs(stored.shape):
        if spec.suffix != "input_scale":
            _place(draft, stored, spec)
            written.add(spec.suffix)
    for suffix, name in stored.names.items():
        if suffix == "pre_quant_scale":
            draft.rename(name, f"{stored.layer}.{suffix}")
        elif suffix not in written and name in draft:
            draft.drop(name)
    _place_input_scale(draft, stored, input_scale)


def _place(draft: Draft, stored: StoredLayer, spec: TensorSpec) -> None:
    name, code, shape = f"{stored.layer}.{spec.suffix}", TORCH_TO_CODE[spec.dtype], tuple(spec.shape)
    part = stored.parts.get(spec.suffix)
    if part is not None and part.found.name in draft:
        draft.rename(part.found.name, name)
    if part is not None and part.keeps_bytes:
        if (part.found.dtype, part.found.shape) != (code, shape):
            draft.retype(name, code, shape)
        return
    draft.make(
        name,
        code,
        shape,
        lambda: stored.tensor(draft.src, spec.suffix),
        after=f"{stored.layer}.weight",
        of=tuple(stored.names.values()),
    )


def _place_input_scale(draft: Draft, stored: StoredLayer, wanted: InputScale) -> None:
    name, part = f"{stored.layer}.input_scale", stored.parts.get("input_scale")
    if part is not None:
        draft.rename(part.found.name, name)
        if part.steps == (Step.RANK,):
            draft.retype(name, "F32", ())
        elif part.steps != ():
            draft.make(name, "F32", (), lambda: stored.tensor(draft.src, "input_scale"), of=(part.found.name,))
        return
    always = any(spec.suffix == "input_scale" for spec in stored.format.tensor_specs(stored.shape))
    if always or (wanted is InputScale.UNIT and is_fp8(stored)):
        draft.put(name, torch.ones(()), after=f"{stored.layer}.weight")
    elif wanted is InputScale.WEIGHT and stored.format.name in ("float8_e4m3fn", "float8_e5m2"):
        draft.make(name, "F32", (), lambda: stored.tensor(draft.src, "weight_scale"), after=f"{stored.layer}.weight")
