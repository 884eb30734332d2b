"""Writing `input_scale` into a file that is already quantized; every other tensor keeps its bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .._version import __version__
from ..checkpoint.source import Source, open_source
from ..errors import RequestError, some_of
from ..input_scales.rule import file_input_scales, rule_of
from ..names.layer_names import LayerNames
from ..progress import Progress
from ..stored.configs import layer_configs
from ..stored.form import Form
from ..stored.layers import StoredLayer, stored_layers
from .rewrite import Draft, Rewrite

METADATA_KEY = "quantpress_input_scales"


@dataclass(frozen=True, slots=True)
class PatchReport:
    """Layers of the file by what became of them. skipped: {name as given: why}. kept: had this very scale already."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    kept: tuple[str, ...]
    skipped: Mapping[str, str]
    notes: tuple[str, ...]


def patch_input_scales(
    source_path: str | Path,
    target_path: str | Path,
    scales: Mapping[str, float],
    *,
    method: str = "",
    overwrite: bool = False,
    reads: Sequence[Path] = (),
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> PatchReport:
    """Copy a quantized file with input scales added or replaced. scales: {any name of a layer: value}.

    method: where they are from, for the header. reads: files they are from, which the target must not be either.
    Layers whose format ignores the tensor are skipped.
    Raises InputFileError, RequestError (nothing to patch, a value that is not a number above 0), OutputError,
    VerificationError, Cancelled.
    """
    with open_source(source_path) as source:
        rewrite, report = plan_patch(source, scales, method)
        rewrite.apply(target_path, overwrite=overwrite, reads=reads, progress=progress, cancel=cancel)
    return report


def plan_patch(source: Source, scales: Mapping[str, float], method: str = "") -> tuple[Rewrite, PatchReport]:
    """What would be written, and the report: the dry run. The source must stay open until the rewrite was applied."""
    layers = stored_layers(source)
    wanted, skipped = _resolve(source, layers, scales)
    if not wanted:
        why = some_of([f"{name}: {reason}" for name, reason in skipped.items()], "; ", 3) or "no scale was given"
        raise RequestError(
            f"{source.path}: there is nothing to patch: {why}. Check that the scales are for this model, and "
            "that its format uses them (FP8 per tensor and NVFP4 do)."
        )
    present, draft = file_input_scales(source, layers), Draft(source)
    added: list[str] = []
    changed: list[str] = []
    kept: list[str] = []
    for name, value in wanted.items():
        layer = layers[name]
        tensor = torch.tensor(value, dtype=torch.float32, device="cpu")
        old = layer.names.get("input_scale")
        same = old is not None and source.tensors[old].shape == () and source.tensors[old].dtype == "F32"
        if same and present[name] == float(tensor):
            kept.append(name)
            continue
        target = old or f"{name}.{'scale_input' if layer.form is Form.LEGACY else 'input_scale'}"
        draft.put(target, tensor, after=_last(source, layer))
        (changed if old else added).append(name)
    draft.metadata[METADATA_KEY] = json.dumps({"pack_version": __version__, "method": method, "layers": len(wanted)})
    notes = [
        f"{m.layer} is described {m.kind.value}; it was left so (`quantpress repair` mends it)."
        for m in layer_configs(source, lenient=True).mismatches
    ]
    return draft.finish(), PatchReport(tuple(added), tuple(changed), tuple(kept), skipped, tuple(notes))


def _resolve(
    source: Source, layers: Mapping[str, StoredLayer], scales: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, str]]:
    """({layer: value} to be written, {name: why not})."""
    names, wanted, skipped = LayerNames(layers), {}, {}
    for name, value in scales.items():
        if not math.isfinite(value) or value <= 0:
            raise RequestError(f"{name}: the input scale {value} was given; a finite number above 0 is needed.")
        layer = names.resolve(name)
        if layer is None:
            skipped[name] = f"{source.path.name} has no quantized layer of this name"
        elif rule_of(layers[layer]) is None:
            skipped[name] = (
                f"{layers[layer].format.on_disk} does not use input_scale"
                if not layers[layer].config.get("full_precision_matrix_mult")
                else "its matrix multiplication is in full precision"
            )
        elif float(torch.tensor(value, dtype=torch.float32, device="cpu")) in (0.0, math.inf):
            raise RequestError(f"{name}: the input scale {value} is beyond float32. Correct it.")
        else:
            wanted[layer] = value
    return wanted, skipped


def _last(source: Source, layer: StoredLayer) -> str:
    """The layer's scale tensor, behind which the new one stands."""
    return layer.names.get("weight_scale_2") or layer.names.get("weight_scale") or layer.names["weight"]
