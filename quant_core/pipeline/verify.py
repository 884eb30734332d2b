"""Checks a file by the rules of the loaders that will read it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.metadata import CONFIG_SUFFIX, HEADER_KEY, decode_config
from ..checkpoint.source import Source, open_source
from ..errors import InputFileError, Problem, Remedy, RequestError, VerificationError, counted
from ..formats import format_of_layer, get_format
from ..stored.configs import layer_configs
from ..stored.fit import fit
from ..stored.legacy import LEGACY_MARKER, LEGACY_NAMES
from ..stored.suffixes import QUANT_SUFFIXES
from ..stored.unread import unread
from .model_rules import EMBEDDING_FORMATS, rules_of
from .plan import for_other_runtime


@dataclass(frozen=True, slots=True)
class Finding:
    """code: stable, for scripts. severity: "error" (a loader fails or draws noise) or "warning".

    setting, remedy: what the user can do about it, as in Problem; not for scripts.
    """

    code: str
    severity: str
    layer: str
    message: str
    setting: str | None = None
    remedy: Remedy = Remedy.CORRECT

    @property
    def problem(self) -> Problem:
        return Problem(self.message, self.setting, self.remedy)

    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "severity": self.severity, "layer": self.layer, "message": str(self.problem)}


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """A quantized layer. The errors are None when there was no source to compare with."""

    layer: str
    format: str
    shape: tuple[int, int]
    relative_error: float | None = None
    snr_db: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "format": self.format,
            "shape": list(self.shape),
            "relative_error": self.relative_error,
            "snr_db": round(self.snr_db, 3) if self.snr_db is not None and math.isfinite(self.snr_db) else None,
        }


@dataclass(frozen=True, slots=True)
class VerifyReport:
    path: str
    layers: tuple[LayerCheck, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity == "error")

    def raise_for_errors(self) -> None:
        """VerificationError that lists every error."""
        if self.errors:
            listed = "\n".join(f"  - {f.message}" for f in self.errors[:20])
            raise VerificationError(f"{self.path}: {counted(len(self.errors), 'error')}:\n{listed}")

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "ok": not self.errors,
            "findings": [f.to_json() for f in self.findings],
            "layers": [layer.to_json() for layer in self.layers],
        }


def check_file(path: str | Path) -> VerifyReport:
    """Keys, dtypes, shapes, JSON, header in sync, finite scales. Reads headers, metadata and scales, no weights.

    Raises InputFileError when the file cannot be read at all.
    """
    with open_source(path) as src:
        findings: list[Finding] = []
        layers = []
        for layer, config in _configs(src, findings):
            checked = check_layer(src, layer, config, findings)
            if checked is not None:
                layers.append(checked)
        findings += _orphans(src, {layer.layer for layer in layers})
        findings += _of_the_model(src, layers)
        for other in unread(src):
            found = other.problem
            findings.append(Finding(other.code, "error", "", found.text, found.setting, found.remedy))
        return VerifyReport(str(path), tuple(layers), tuple(findings))


def _configs(src: Source, findings: list[Finding]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every layer's strict JSON; a finding for each that a loader cannot read, and for a header out of sync."""
    for name in src.tensors:
        layer = name.removesuffix(CONFIG_SUFFIX)
        if layer == name:
            continue
        info = src.tensors[name]
        if info.dtype != "U8" or len(info.shape) != 1:
            findings.append(
                Finding(
                    "config-dtype",
                    "error",
                    layer,
                    f"{name} is {info.dtype} {list(info.shape)}; ComfyUI reads a 1-D U8 tensor of JSON bytes.",
                )
            )
            continue
        try:
            yield layer, decode_config(src.read(name), layer)
        except InputFileError as err:
            findings.append(Finding("config-json", "error", layer, str(err)))
    if any(f.code.startswith("config") for f in findings):
        return
    try:
        both = layer_configs(src)
    except InputFileError as err:
        findings.append(Finding("header-json", "error", "", str(err)))
        return
    for mismatch in both.mismatches:
        if HEADER_KEY not in src.metadata:
            findings.append(
                Finding(
                    "header-missing",
                    "warning",
                    "",
                    f"the header has no {HEADER_KEY}; ComfyUI does not need it, some tools do.",
                )
            )
            break
        findings.append(
            Finding(
                "header-sync",
                "error",
                mismatch.layer,
                f"{mismatch.layer}: {mismatch.kind.value} ({mismatch.detail}). ComfyUI takes the header's.",
            )
        )


def check_layer(src: Source, layer: str, config: dict[str, Any], findings: list[Finding]) -> LayerCheck | None:
    names = {s: f"{layer}.{s}" for s in QUANT_SUFFIXES if f"{layer}.{s}" in src.tensors and s != "comfy_quant"}

    def problem(code: str, text: str) -> None:
        findings.append(Finding(code, "error", layer, text))

    if "weight" not in names:
        problem("weight-missing", f"{layer} has a comfy_quant tensor and no weight.")
        return None
    shapes = {suffix: src.tensors[name].shape for suffix, name in names.items()}
    try:
        fmt = format_of_layer(layer, config, shapes)
        shape = fmt.shape_from(shapes, config)
        specs = fmt.tensor_specs(shape)
    except RequestError as err:
        problem("format", str(err))
        return None
    refused = fmt.refused_by_kernels(shape, config)
    misfit = fmt.misfit(shape)
    if refused:
        problem(
            "kernel-refuses",
            f"{layer}: {refused}. ComfyUI loads the layer, and stops or draws noise when it runs. Quantize the source "
            "again, which makes no such layer, or requantize this file to another format.",
        )
    elif misfit:
        problem("shape", f"{layer}: {misfit}.")
    for spec in specs:
        info = src.tensors.get(f"{layer}.{spec.suffix}")
        if info is None:
            problem("tensor-missing", f"{layer}.{spec.suffix} is missing; {fmt.on_disk} needs it.")
        elif (part := fit(spec, info, fmt, shape)).steps != ():
            problem("tensor-shape", f"{part.difference}.")
    signed = {spec.suffix for spec in specs if spec.signed} | {"pre_quant_scale"}
    _check_scales(src, layer, names, signed, findings)
    bias = src.tensors.get(f"{layer}.bias")
    if bias is not None and bias.shape != (shape[0],):
        problem("bias-shape", f"{layer}.bias has shape {list(bias.shape)}; the weight has {shape[0]} output channels.")
    return LayerCheck(layer, fmt.name, shape)


def _check_scales(
    src: Source, layer: str, names: dict[str, str], signed: Collection[str], findings: list[Finding]
) -> None:
    """signed: suffixes of the tensors whose values may be negative."""
    for suffix, name in names.items():
        info = src.tensors[name]
        if suffix == "weight" or info.dtype == "U8":
            continue
        values = src.read(name).to(torch.float32)
        bad = int((~torch.isfinite(values)).sum())
        negative = 0 if suffix in signed else int((values < 0).sum())
        if bad or negative:
            findings.append(
                Finding(
                    "scale-value",
                    "error",
                    layer,
                    f"{name}: {bad} of {values.numel()} values are NaN or Inf "
                    f"and {negative} are negative; scales must be finite and not negative.",
                )
            )
        if suffix == "input_scale" and (info.shape != () or info.dtype != "F32" or bool((values == 0).any())):
            findings.append(
                Finding(
                    "input-scale",
                    "error",
                    layer,
                    f"{name} is {info.dtype} {list(info.shape)}; "
                    "one positive F32 number without dimensions is needed.",
                )
            )


def _of_the_model(src: Source, layers: Sequence[LayerCheck]) -> list[Finding]:
    """What ComfyUI's code for this model cannot read."""
    if not layers:
        return []
    model = rules_of(src, {layer.layer: layer.shape for layer in layers})
    findings = []
    problem = model.problem()
    if problem is not None:
        severity = "warning" if for_other_runtime(src) else "error"
        findings.append(Finding("not-for-comfyui", severity, "", problem.text))
    for layer in layers:
        what = model.not_linear(layer.layer)
        fmt = get_format(layer.format).on_disk
        if what is not None and not (model.is_embedding(layer.layer) and fmt in EMBEDDING_FORMATS):
            text = (
                f"{layer.layer}.weight is quantized ({layer.format}) and is {what}: ComfyUI takes the codes for its "
                "values. Quantize the source again, which keeps it."
            )
            findings.append(Finding("not-linear", "error", layer.layer, text))
        shape = src.tensors[f"{layer.layer}.weight"].shape
        if model.keeps_shape(layer.layer) and shape != layer.shape:
            text = (
                f"{layer.layer}.weight is packed ({list(shape)} for {list(layer.shape)}), and ComfyUI tells by its "
                f"shape which {model.name} this is. Quantize the source again, which keeps its shape."
            )
            findings.append(Finding("packed-shape", "error", layer.layer, text))
    return findings


def _orphans(src: Source, layers: set[str]) -> list[Finding]:
    """Scales and packed weights that belong to no quantized layer, and legacy forms."""
    findings = []
    suffixes = tuple(f".{s}" for s in QUANT_SUFFIXES if s not in ("weight", "comfy_quant"))
    for name in src.tensors:
        layer, _, last = name.rpartition(".")
        if name.endswith(suffixes) and layer not in layers and f"{layer}.comfy_quant" not in src.tensors:
            findings.append(
                Finding("orphan", "error", layer, f"{name} belongs to no layer with a comfy_quant tensor.")
            )
        if name == LEGACY_MARKER or last in LEGACY_NAMES:
            findings.append(Finding("legacy", "warning", layer, f"{name} is of the legacy fp8_scaled form."))
    return findings
