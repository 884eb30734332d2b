"""Whether one change of a LoRA can be made: parts, shapes and values. Every refusal names the tensor."""

from __future__ import annotations

import torch

from ..checkpoint.source import Source
from ..errors import InputFileError
from ..names.layer_cuts import Cut
from ..names.layer_names import Place
from .lora_adapters import ADAPTERS, Factors, Shape, flat_shape
from .lora_changes import FLOATS, Change
from .lora_file import Candidate

_FACTOR_DTYPES = (*FLOATS, "F8_E4M3", "F8_E5M2")
_NO_MATRICES = ("dora_scale", "reshape_weight")
_DAMAGED = "The file is damaged: take another copy."
_THIS_MODEL = "Give a LoRA of this model."


def change_of(
    lora: Source,
    base: str,
    found: Candidate,
    place: Place,
    shapes: tuple[Shape, Shape],
    strength: float,
    *,
    widen: bool,
) -> Change | None:
    """The change, checked; None when it changes nothing (rank 0). Raises InputFileError.

    shapes: of the tensor that is changed, and of its layer's weight, by which rows are told. widen: the weight takes
    the shape that the factors make.
    """
    shape, weight = shapes
    alpha = _alpha(lora, found.names.get("alpha"))
    factors = Factors(lora, {part: name for part, name in found.names.items() if part != "alpha"}, alpha)
    for part, name in factors.names.items():
        _check_factor(lora, name, matrix=part == "down" or not (found.part or part in _NO_MATRICES))
    rows = slice(None) if place.cut is Cut.ALL else place.cut.rows(weight)
    swapped = place.cut is Cut.SWAPPED and weight[0] == 2 * flat_shape(weight)[1]
    reshape = _reshape(factors, base, shape, widen=widen and not found.part)
    if reshape and place.cut is not Cut.ALL:
        raise InputFileError(f"{base}: it widens {place.layer}, of which it is a part only. {_THIS_MODEL}")
    change = Change(factors, found.kind, strength, rows, swapped, found.part, reshape)
    after = reshape or shape
    part_of_it = (len(range(*rows.indices(after[0]))), *after[1:]) if after else after
    changes = _check_whole(change, base, part_of_it) if found.part else _check_adapter(change, base, part_of_it)
    if not changes:
        return None
    for name in factors.names.values():
        if not bool(torch.isfinite(lora.read(name).to(torch.float32)).all()):
            raise InputFileError(f"{name} holds NaN or Inf. {_DAMAGED}")
    return change


def _alpha(lora: Source, name: str | None) -> float | None:
    if name is None:
        return None
    value = lora.read(name).to(torch.float64)
    if value.numel() != 1:
        raise InputFileError(f"{name} has the shape {list(value.shape)}; an alpha is one number. {_DAMAGED}")
    if not bool(torch.isfinite(value).all()):
        raise InputFileError(f"{name} is {value.item()}. {_DAMAGED}")
    return float(value.item())


def _check_factor(lora: Source, name: str, *, matrix: bool) -> None:
    info = lora.tensors[name]
    if info.dtype not in _FACTOR_DTYPES and not name.endswith(".reshape_weight"):
        raise InputFileError(f"{name} is {info.dtype}, no floating-point tensor. Give a LoRA that is not quantized.")
    if matrix and len(info.shape) < 2:
        raise InputFileError(
            f"{name} has the shape {list(info.shape)}; a factor has two dimensions or more. {_DAMAGED}"
        )


def _reshape(factors: Factors, base: str, shape: Shape, *, widen: bool) -> Shape | None:
    if "reshape_weight" in factors.names:
        sizes = factors.read("reshape_weight").flatten()
        wanted = tuple(int(size) for size in torch.nan_to_num(sizes).tolist())
    elif widen and "up" in factors.names and "down" in factors.names:
        wanted = factors.shape("up")[0], factors.shape("down")[1]
    else:
        return None
    if len(wanted) != len(shape) or any(new < old for new, old in zip(wanted, shape, strict=True)):
        raise InputFileError(
            f"{base}: it asks for the shape {list(wanted)}; the model's is {list(shape)}, and a LoRA can "
            f"only widen it. {_THIS_MODEL}"
        )
    return None if wanted == shape else wanted


def _check_whole(change: Change, base: str, shape: Shape) -> bool:
    """Whether a full difference changes anything. shape: of the rows that it changes."""
    factors = change.factors
    if change.part == "up_bias" and "down" not in factors.names:
        raise InputFileError(f"{base}: a bias of lora_B without a lora_A. {_DAMAGED}")
    if factors.shape(change.part) != shape:
        raise InputFileError(_misfit(factors, base, shape))
    return change.part != "up_bias" or factors.shape("down")[0] > 0


def _check_adapter(change: Change, base: str, shape: Shape) -> bool:
    """Whether it changes anything. shape: of the rows that it changes."""
    factors, adapter = change.factors, ADAPTERS[change.kind]
    kind = change.kind.value
    missing = adapter.missing(factors.names)
    if missing:
        raise InputFileError(f"{base}: no {missing} factor of a {kind}. {_DAMAGED}")
    beside = [factors.names[part] for part in factors.names if part not in (*adapter.needs, *adapter.may)]
    if beside:
        raise InputFileError(f"{base}: {beside[0]} does not go with a {kind}. Merge it with the tool that trained it.")
    if not shape:
        raise InputFileError(f"{base}: the model's tensor is one number, and no {kind} changes that. {_THIS_MODEL}")
    if adapter.makes(factors, shape) != flat_shape(shape):
        raise InputFileError(_misfit(factors, base, shape))
    if "dora_scale" in factors.names:
        _check_magnitude(factors, shape)
    return adapter.rank(factors, shape) != 0


def _check_magnitude(factors: Factors, shape: Shape) -> None:
    magnitude = factors.shape("dora_scale")
    count = torch.Size(magnitude).numel()
    first = magnitude[0] if magnitude else 0
    by_row, by_column = first == shape[0] == count, (count,) == shape[1:2] and (first != shape[0] or first == 1)
    if len(shape) < 2 or not (by_row or by_column):
        raise InputFileError(
            f"{factors.names['dora_scale']} has the shape {list(magnitude)}; a weight {list(shape)} needs one number "
            f"for each row or each column. {_THIS_MODEL}"
        )


def _misfit(factors: Factors, base: str, shape: Shape) -> str:
    parts = [f"{part} {list(factors.shape(part))}" for part in factors.names if part != "dora_scale"]
    listed = f"{', '.join(parts[:-1])} and {parts[-1]} do" if len(parts) > 1 else f"{parts[0]} does"
    return f"{base}: {listed} not make a {list(shape)} change. {_THIS_MODEL}"
