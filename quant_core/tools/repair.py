"""Repairing a quantized file: everything that has one exact answer is put right, the rest is only reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..checkpoint.metadata import HEADER_KEY, Config
from ..checkpoint.source import Source
from ..errors import RequestError, counted, some_of
from ..formats import get_format
from ..numerics.packing import swizzle_scales
from ..pipeline.verify import Finding, check_layer
from ..stored.canonical import canonical_config
from ..stored.foreign import refusal
from ..stored.layers import StoredLayer
from .canonicalize import canonicalize
from .configs import HeaderMode, write_configs
from .diagnose import BEYOND_REPAIR, MODELOPT, Diagnosis, diagnose
from .rewrite import Draft, Rewrite


@dataclass(frozen=True, slots=True)
class Repair:
    """findings: all. unfixed: those that stay. rewrite: the repaired file; without changes where all is
    well.
    """

    findings: tuple[Finding, ...]
    unfixed: tuple[Finding, ...]
    rewrite: Rewrite

    def to_json(self) -> dict[str, Any]:
        return {
            "findings": [{**finding.to_json(), "fixed": finding not in self.unfixed} for finding in self.findings],
            **self.rewrite.to_json(),
        }


def repair(src: Source, *, assume: str | None = None, unswizzled: bool = False) -> Repair:
    """Findings and the repaired file. Legacy files are left to `migrate`.

    assume: a format, or "modelopt", for layers whose tensors alone do not tell what they are. unswizzled: the block
    scales of NVFP4 and MXFP8 are in row order, even where their shape does not show it.
    Raises RequestError (no such format; unswizzled without such layers), InputFileError.
    """
    if assume is not None and assume != MODELOPT:
        get_format(assume)  # a name that no layer needs is wrong all the same
    found = diagnose(src, assume)
    named = any(finding.code in ("foreign", "undescribed") for finding in found.findings)
    if not found.layers and not named and (foreign := refusal(src)):
        found.note("foreign", "", foreign, fixed=False)
    draft = Draft(src)
    configs: dict[str, Config] = {}
    for layer, stored in found.layers.items():
        configs[layer] = canonical_config(stored)
        canonicalize(draft, stored)
    if unswizzled:
        _swizzle(draft, [stored for stored in found.layers.values() if stored.format.pad_to > 1], found.findings)
    for name in found.drop:
        draft.drop(name)
    if any(finding.code == "header-json" for finding in found.findings):
        draft.metadata.pop(HEADER_KEY)
    write_configs(draft, configs, HeaderMode.BUILD if configs else HeaderMode.KEEP, found.unsettled)
    _note_unsettled(draft, found.unsettled)
    told = _hidden(src, found, configs)
    return Repair(tuple(found.findings), tuple(found.unfixed), replace(draft.finish(), told=told))


def _hidden(src: Source, found: Diagnosis, configs: Mapping[str, Config]) -> tuple[str, ...]:
    """Note what nobody can repair in layers whose own description could not be read.

    A check of the file does not look there.
    """
    known = {(finding.code, finding.layer) for finding in found.findings}
    seen: list[Finding] = []
    for layer, config in configs.items():
        check_layer(src, layer, config, seen)
    hidden = [
        finding for finding in seen if finding.code in BEYOND_REPAIR and (finding.code, finding.layer) not in known
    ]
    for finding in hidden:
        found.note(finding.code, finding.layer, finding.message, finding.severity, fixed=False)
    return tuple(finding.code for finding in hidden)


def _note_unsettled(draft: Draft, unsettled: Mapping[str, Config]) -> None:
    if unsettled:
        draft.notes.append(
            f"{counted(len(unsettled), 'layer is left as it is', 'layers are left as they are')}: "
            f"{some_of(list(unsettled))}."
        )


def _swizzle(draft: Draft, layers: list[StoredLayer], findings: list[Finding]) -> None:
    if not layers:
        raise RequestError(f"{draft.src.path}: no layer is NVFP4 or MXFP8, so there are no block scales to reorder.")
    for stored in layers:
        name = f"{stored.layer}.weight_scale"
        info = draft.src.tensors[name]
        rows, cols = stored.format.scale_grid(stored.format.work_shape(stored.shape))
        if info.shape == (rows, cols) and rows % 128 == 0 and cols % 4 == 0:
            draft.make(name, draft.content(name).dtype, info.shape, _swizzled(stored, draft.src), of=(name,))
            findings.append(
                Finding("scale-unswizzled", "error", stored.layer, f"{name}: taken to be in row order, as requested.")
            )


def _swizzled(stored: StoredLayer, src: Source) -> Callable[[], Tensor]:
    def make() -> Tensor:
        return swizzle_scales(stored.tensor(src, "weight_scale"))

    return make
