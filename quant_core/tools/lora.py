"""LoRA files baked into a model's weights, before it is quantized.

Reads kohya, diffusers, peft and LyCORIS-LoRA names, fused layers (q, k and v of one weight) and convolutions included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..checkpoint.header import CODE_TO_TORCH
from ..checkpoint.source import Source
from ..errors import InputFileError, PlanError, Problem, Remedy, counted, some_of
from ..names.layer_names import LayerNames, diffusers_names
from ..names.lora_keys import Factor, LoraKey, parse_lora_key
from ..names.prefixes import TEXT_ENCODER, strip_prefixes
from ..stored.layers import stored_layers
from .rewrite import Draft, Rewrite

RECORD_KEY = "quantpress_loras"
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Delta:
    """One change of some rows of a weight: strength * alpha / rank * up @ down.

    down: [rank, in, ...], up: [rows, rank, ...], alpha: a number's tensor, or None for alpha = rank.
    """

    src: Source
    base: str
    down: str
    up: str
    alpha: str | None
    rows: slice
    strength: float

    def matrix(self, columns: int) -> Tensor:
        """float32 [rows, columns]."""
        down = self.src.read(self.down).to(torch.float32).flatten(1)
        up = self.src.read(self.up).to(torch.float32).flatten(1)
        alpha = float(self.src.read(self.alpha).to(torch.float32)) if self.alpha else float(down.shape[0])
        return (up @ down).reshape(-1, columns) * (self.strength * alpha / down.shape[0])


def bake(src: Source, loras: Sequence[tuple[Source, float]], *, skip_unmatched: bool = False) -> Rewrite:
    """Every LoRA (source, strength) added to the weights in float32, and rounded once to the weight's own dtype.

    skip_unmatched: layers of a LoRA that the model has not are left out and noted; by default they are an error.
    Parts of text encoders are always left out and noted. Raises PlanError with all problems: layers the model has not,
    shapes that do not fit, DoRA and other kinds, quantized weights.
    """
    problems: list[str | Problem] = []
    draft = Draft(src)
    names = LayerNames(
        [
            name.removesuffix(".weight")
            for name, info in src.tensors.items()
            if name.endswith(".weight") and len(info.shape) >= 2
        ]
    )
    deltas: dict[str, list[Delta]] = {}
    for lora, strength in loras:
        found = _deltas(src, lora, strength, names, skip_unmatched, problems, draft.notes)
        for layer, delta in found:
            deltas.setdefault(layer, []).append(delta)
    stored = stored_layers(src)
    problems += [
        f"{layer} is quantized ({stored[layer].format.name}): bake LoRAs into the 16-bit model, or dequantize it "
        "first."
        for layer in deltas
        if layer in stored
    ][:8]
    if problems:
        raise PlanError(problems)
    if not deltas:
        raise PlanError(
            [
                f"{lora.path}: nothing in it changes a layer of {src.path.name}. Give a LoRA of this model."
                for lora, _ in loras
            ]
            or ["no LoRA was given."]
        )
    for layer, changes in deltas.items():
        name = f"{layer}.weight"
        info = src.tensors[name]
        draft.make(name, info.dtype, info.shape, partial(_merged, src, name, changes), of=(name,))
    draft.metadata[RECORD_KEY] = _record(src, loras)
    draft.notes.append(f"{counted(len(deltas), 'weight')} changed")
    return draft.finish()


def _merged(src: Source, name: str, changes: Sequence[Delta]) -> Tensor:
    info = src.tensors[name]
    weight = src.read(name).to(torch.float32)
    flat = weight.flatten(1)  # a view: writes reach `weight`
    for change in changes:
        flat[change.rows] += change.matrix(flat.shape[1])
    merged = weight.to(CODE_TO_TORCH[info.dtype])
    if not bool(torch.isfinite(merged).all()):
        raise InputFileError(f"{name}: with the LoRA, weights exceed what {info.dtype} holds. Lower the strength.")
    return merged


def _deltas(
    src: Source,
    lora: Source,
    strength: float,
    names: LayerNames,
    skip: bool,
    problems: list[str | Problem],
    notes: list[str],
) -> list[tuple[str, Delta]]:
    """(layer, change) of one LoRA; problems and notes are added to."""
    factors, other = _factors(lora)
    where = lora.path.name
    problems += _no_plain_lora(lora, factors, other)
    found, unknown, text = [], [], 0
    for base, parts in factors.items():
        layer = names.resolve(base)
        if layer is None:
            text += bool(TEXT_ENCODER.match(base))
            unknown += [] if TEXT_ENCODER.match(base) else [base]
            continue
        missing = [factor.value for factor in (Factor.DOWN, Factor.UP) if factor not in parts]
        if Factor.BESIDE in parts or missing:
            why = (
                f"{parts[Factor.BESIDE]} makes it more than a LoRA"
                if Factor.BESIDE in parts
                else f"no {missing[0]} factor"
            )
            problems.append(f"{where}: {base}: {why}. Bake it with the tool it was made for.")
            continue
        delta = Delta(lora, base, parts[Factor.DOWN], parts[Factor.UP], parts.get(Factor.ALPHA), slice(0), strength)
        rows = _rows(src.tensors[f"{layer}.weight"].shape, layer, base)
        problem = _misfit(src, lora, layer, delta, rows)
        if problem:
            problems.append(f"{where}: {base}: {problem}")
        else:
            found.append((layer, Delta(lora, base, delta.down, delta.up, delta.alpha, rows, strength)))
    if text:
        notes.append(
            f"{where}: {counted(text, 'layer of a text encoder is', 'layers of a text encoder are')} left out."
        )
    if unknown:
        layers = counted(len(unknown), "layer is", "layers are")
        sentence = f"{where}: {layers} not in {src.path.name}: {some_of(unknown, shown=4)}."
        if skip:
            notes.append(f"{sentence} Left out.")
        else:
            problems.append(Problem(f"{sentence} Give a LoRA of this model.", "skip_unmatched", Remedy.LEAVE_OUT))
    return found


def _no_plain_lora(lora: Source, factors: Mapping[str, Mapping[Factor, str]], other: set[str]) -> list[str]:
    where = lora.path.name
    if not factors:
        return [
            f"{where}: this is not a LoRA: none of its {counted(len(lora.tensors), 'tensor')} is a factor of one; "
            f"they are called like {next(iter(lora.tensors), '')!r}. Give the file of a LoRA."
        ]
    if other:
        return [
            f"{where}: {some_of(sorted(other))}: only plain LoRAs can be baked. Bake it with the tool it was made for."
        ]
    return []


def _factors(lora: Source) -> tuple[dict[str, dict[Factor, str]], set[str]]:
    """({layer as the LoRA names it: {factor: tensor}}, other kinds of adapters found)."""
    factors: dict[str, dict[Factor, str]] = {}
    other = set()
    for name in lora.tensors:
        key = parse_lora_key(name)
        if isinstance(key, LoraKey):
            factors.setdefault(key.base, {})[key.factor] = name
        else:
            other.add(key or f"unknown tensor {name}")
    return factors, other


def _rows(shape: tuple[int, ...], layer: str, base: str) -> slice:
    """The rows of a weight that one part of a fused layer covers; all of them where names agree.

    q, k and v take a third each; with an MLP behind them (Flux's linear1) each takes in_features rows, the MLP the
    rest.
    """
    own, part = strip_prefixes(layer), strip_prefixes(base)
    parts = diffusers_names(own)
    aliases = [alias for alias in parts if alias == part or part.endswith(alias.replace(".", "_"))]
    if len(parts) < 2 or not aliases:
        return slice(0, shape[0])
    index = parts.index(aliases[0])
    if len(parts) == 3:
        third = shape[0] // 3
        return slice(index * third, (index + 1) * third)
    return slice(index * shape[1], (index + 1) * shape[1] if index < len(parts) - 1 else shape[0])


def _misfit(src: Source, lora: Source, layer: str, delta: Delta, rows: slice) -> str | None:
    weight = src.tensors[f"{layer}.weight"]
    down, up = lora.tensors[delta.down].shape, lora.tensors[delta.up].shape
    if weight.dtype not in _FLOATS:
        return None  # quantized: said once for all
    if any(lora.tensors[name].dtype not in _FLOATS for name in (delta.down, delta.up)):
        return "its factors are not floating-point tensors."
    needed = (rows.stop - rows.start, *weight.shape[1:])
    pointwise = all(size == 1 for size in up[2:])  # a 1x1 up factor: the product is a matrix product
    got = (up[0], *down[1:]) if len(up) >= 2 and len(down) >= 2 else (*up, *down)
    if not pointwise or up[1:2] != down[:1] or _flat(got) != _flat(needed):
        return (
            f"up {list(up)} and down {list(down)} do not make a {list(needed)} change of {layer}. Give a LoRA of this "
            "model."
        )
    return None


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns; [N, K, 1, 1] is [N, K]."""
    return shape[0], torch.Size(shape[1:]).numel()


def _record(src: Source, loras: Sequence[tuple[Source, float]]) -> str:
    try:
        before = json.loads(src.metadata.get(RECORD_KEY, "[]"))
    except ValueError as err:
        raise InputFileError(
            f"{src.path}: the header entry {RECORD_KEY} is not JSON ({err}). Remove it, or take another copy."
        ) from err
    if not isinstance(before, list):
        raise InputFileError(
            f"{src.path}: the header entry {RECORD_KEY} is not a list. Remove it, or take another copy."
        )
    return json.dumps(
        before
        + [{"file": lora.path.name, "hash": lora.identity_hash(), "strength": strength} for lora, strength in loras]
    )
