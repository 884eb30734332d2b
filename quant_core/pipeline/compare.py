"""A quantized file against its source: the error of every layer, and that the rest is equal byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..cancel import poll
from ..checkpoint.source import Source, open_source
from ..numerics.metrics import relative_error, snr_db
from ..progress import Clock, Progress
from ..stored.layers import StoredLayer, stored_layers
from ..stored.legacy import LEGACY_MARKER, LEGACY_NAMES
from .plan import RECIPE_KEY
from .verify import Finding, LayerCheck, VerifyReport, check_file


def verify_file(
    path: str | Path,
    against: str | Path | None = None,
    *,
    worst_allowed: float = 0.5,
    progress: Callable[[Progress], None] | None = None,
) -> VerifyReport:
    """check_file, and with a source the error of every layer against it; copied tensors must be equal byte for byte.

    worst_allowed: a layer whose relative error is larger is an error finding; such a layer draws noise.
    """
    report = check_file(path)
    if against is None or report.errors:
        return report
    findings = list(report.findings)
    with open_source(path) as src, open_source(against) as ref:
        report = _with_older_forms(src, report)
        layers = tuple(_compare_layers(src, ref, report, worst_allowed, findings, progress))
        findings += _compare_copies(src, ref, report, worst_allowed)
    return VerifyReport(str(path), layers, tuple(findings))


def _with_older_forms(src: Source, report: VerifyReport) -> VerifyReport:
    """The report with the layers of legacy and foreign forms, which decode, though ComfyUI does not know them."""
    known = {check.layer for check in report.layers}
    more = tuple(
        LayerCheck(layer, entry.format.name, entry.shape)
        for layer, entry in stored_layers(src).items()
        if layer not in known
    )
    return replace(report, layers=report.layers + more)


def _compare_layers(
    src: Source,
    ref: Source,
    report: VerifyReport,
    worst_allowed: float,
    findings: list[Finding],
    progress: Callable[[Progress], None] | None,
) -> Iterator[LayerCheck]:
    ours, theirs = stored_layers(src), stored_layers(ref)
    sizes = {
        check.layer: sum(src.tensors[name].nbytes for name in ours[check.layer].names.values())
        for check in report.layers
    }
    clock = Clock(len(sizes), sum(sizes.values()))
    for check in report.layers:
        poll()
        if progress is not None:
            progress(clock.state(check.layer))
        clock.advance(check.layer, sizes[check.layer])
        layer = check.layer
        if f"{layer}.weight" not in ref.tensors:
            findings.append(Finding("not-in-source", "error", layer, f"{layer} is not in the source {ref.path.name}."))
            yield check
            continue
        reference = theirs[layer].decode(ref) if layer in theirs else ref.read(f"{layer}.weight").to(torch.float32)
        if tuple(reference.shape) != check.shape:
            findings.append(
                Finding(
                    "source-shape",
                    "error",
                    layer,
                    f"{layer} is {list(check.shape)} here and "
                    f"{list(reference.shape)} in the source; this is another model.",
                )
            )
            yield check
            continue
        error = relative_error(reference, ours[layer].decode(src))
        if not error <= worst_allowed:
            findings.append(
                Finding(
                    "large-error",
                    "error",
                    layer,
                    f"{layer}: relative error {error:.3f} against the source; "
                    f"above {worst_allowed} the layer is noise. Keep it, or choose a finer format.",
                )
            )
        yield LayerCheck(layer, check.format, check.shape, error, snr_db(error))


def _compare_copies(src: Source, ref: Source, report: VerifyReport, worst_allowed: float) -> list[Finding]:
    quantized = {f"{layer.layer}." for layer in report.layers}
    consumed = {name for layer in stored_layers(src).values() for name in layer.names.values()}
    corrected = {f"{layer.layer}.bias" for layer in report.layers} if _biases_corrected(src) else set()
    theirs, decoded = stored_layers(ref), _decoded_layers(src)
    findings: list[Finding] = []
    for name, info in src.tensors.items():
        owner, last = name.rpartition(".")[0] + ".", name.rpartition(".")[2]
        if (
            (owner in quantized and last != "bias")
            or name in consumed
            or last in LEGACY_NAMES
            or last == LEGACY_MARKER
        ):
            continue
        poll()
        if name == f"{owner}weight" and (owner[:-1] in theirs or owner[:-1] in decoded):
            findings += _compare_decoded(src, ref, name, theirs.get(owner[:-1]), worst_allowed)
            continue
        other = ref.tensors.get(name)
        if other is None or (other.dtype, other.shape) != (info.dtype, info.shape):
            findings.append(
                Finding("copy-differs", "error", owner[:-1], f"{name} is not in the source with this dtype and shape.")
            )
        elif name not in corrected and not torch.equal(src.read_bytes(name), ref.read_bytes(name)):
            findings.append(
                Finding(
                    "copy-differs", "error", owner[:-1], f"{name} differs from the source, though it is not quantized."
                )
            )
    return findings


def _compare_decoded(
    src: Source, ref: Source, name: str, theirs: StoredLayer | None, worst_allowed: float
) -> Iterator[Finding]:
    """A weight that is not quantized here. In the source it is, or it is in that source's own source."""
    layer, info = name.removesuffix(".weight"), src.tensors[name]
    if theirs is None and name not in ref.tensors:
        yield Finding("not-in-source", "error", layer, f"{layer} is not in the source {ref.path.name}.")
        return
    weight = src.read(name)
    reference = ref.read(name).to(torch.float32) if theirs is None else theirs.decode(ref)
    if reference.shape != weight.shape:
        text = f"{name} is {list(info.shape)} here and {list(reference.shape)} in the source; this is another model."
        yield Finding("source-shape", "error", layer, text)
    elif theirs is not None and not torch.equal(weight.nan_to_num(), reference.to(weight.dtype).nan_to_num()):
        text = f"{name} is not what the source's quantized layer decodes to, though it is not quantized here."
        yield Finding("copy-differs", "error", layer, text)
    elif theirs is None and not relative_error(reference, weight.to(torch.float32)) <= worst_allowed:
        text = f"{name} was decoded from a quantized file, and differs from the source by more than {worst_allowed}."
        yield Finding("large-error", "error", layer, text)


def _decoded_layers(src: Source) -> frozenset[str]:
    """The kept layers that the file records as decoded."""
    found = _record(src).get("decoded")
    return frozenset(name for name in found if isinstance(name, str)) if isinstance(found, list) else frozenset()


def _biases_corrected(src: Source) -> bool:
    """Whether the file records that its quantized layers' biases were corrected, and so may differ from the source."""
    use = _record(src).get("calibration")
    return isinstance(use, dict) and use.get("bias_correction") is True


def _record(src: Source) -> dict[str, Any]:
    """What QuantPress recorded of the run; nothing, where it did not write the file."""
    try:
        record = json.loads(src.metadata.get(RECIPE_KEY, "{}"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
