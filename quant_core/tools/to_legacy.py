"""comfy_quant -> the legacy fp8_scaled form, for loaders that know only that one."""

from __future__ import annotations

import torch

from ..checkpoint.source import Source
from ..errors import PlanError, RequestError, counted, some_of
from ..names.prefixes import known_prefix
from ..stored.layers import StoredLayer, stored_layers
from ..stored.legacy import LEGACY_MARKER
from .canonicalize import canonicalize
from .configs import HeaderMode, write_configs
from .rewrite import Draft, Rewrite


def to_legacy(src: Source, *, scale_input: bool = False) -> Rewrite:
    """Every layer renamed to scale_weight and scale_input, with a scaled_fp8 marker; the codes stay byte for byte.

    The marker has two elements when the layers have full_precision_matrix_mult, else none. scale_input: 1.0 where a
    layer has none. Raises PlanError: a layer that is not FP8 E4M3 with one scale, or layers that differ in
    full_precision_matrix_mult, for which there is one marker only.
    """
    stored = stored_layers(src)
    if not stored:
        raise RequestError(f"{src.path}: nothing in it is quantized. Use the file as it is.")
    full_precision = _check(stored)
    draft = Draft(src)
    for layer, entry in stored.items():
        canonicalize(draft, entry)
        draft.rename(f"{layer}.weight_scale", f"{layer}.scale_weight")
        if f"{layer}.input_scale" in draft:
            draft.rename(f"{layer}.input_scale", f"{layer}.scale_input")
        elif scale_input:
            draft.put(f"{layer}.scale_input", torch.ones(()), after=f"{layer}.weight")
    write_configs(draft, dict.fromkeys(stored), HeaderMode.DROP)
    prefix = known_prefix(next(iter(stored)))
    draft.put(prefix + LEGACY_MARKER, torch.zeros(2 if full_precision else 0).to(torch.float8_e4m3fn))
    return draft.finish()


def _check(stored: dict[str, StoredLayer]) -> bool:
    problems = []
    other = [
        f"{layer} ({entry.format.name})" for layer, entry in stored.items() if entry.format.name != "float8_e4m3fn"
    ]
    if other:
        problems.append(
            f"{counted(len(other), 'layer has', 'layers have')} no legacy form, which is FP8 E4M3 with one scale per "
            f"weight: {some_of(other)}. "
            "Requantize them to float8_e4m3fn first."
        )
    flags = [bool(entry.config.get("full_precision_matrix_mult")) for entry in stored.values()]
    if len(set(flags)) > 1:
        problems.append(
            f"{sum(flags)} of {counted(len(flags), 'layer')} have full_precision_matrix_mult; the legacy form "
            "knows only all or none. Set it everywhere or remove it first: `quantpress edit`."
        )
    if problems:
        raise PlanError(problems)
    return flags[0]
