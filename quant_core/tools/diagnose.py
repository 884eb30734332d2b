"""What is wrong with a quantized file: findings with codes, and what each layer really is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..checkpoint.header import TensorInfo
from ..checkpoint.metadata import CONFIG_SUFFIX, HEADER_KEY, Config, decode_config, same_json
from ..checkpoint.source import Source
from ..errors import InputFileError, Remedy, RequestError, counted
from ..formats import get_format
from ..formats.base import Format
from ..names.diffusers import diffusers_warning
from ..names.prefixes import prefix_changes
from ..pipeline.verify import Finding, check_file
from ..stored.fit import WORDS
from ..stored.form import Form
from ..stored.inferred import Inferred, infer
from ..stored.layers import StoredLayer, describe_layer, layer_names
from ..stored.legacy import CODED, is_modelopt
from ..stored.suffixes import QUANT_SUFFIXES
from ..stored.unread import codes_problem
from .configs import header_object
from .moved import moved_layers

MODELOPT = "modelopt"
BEYOND_REPAIR = ("scale-value", "bias-shape", "kernel-refuses", "scale-name", "foreign")


@dataclass(slots=True)
class Diagnosis:
    """layers: what each quantized layer is, where that is certain. drop: tensors that belong to nothing.

    unsettled: what the file says of layers of which it is not certain. unfixed: the findings that no exact repair
    exists for; their messages say what to do.
    """

    findings: list[Finding] = field(default_factory=list)
    layers: dict[str, StoredLayer] = field(default_factory=dict)
    drop: list[str] = field(default_factory=list)
    unsettled: dict[str, Config] = field(default_factory=dict)
    unfixed: list[Finding] = field(default_factory=list)

    def note(self, code: str, layer: str, message: str, severity: str = "error", fixed: bool = True) -> None:
        self.add(Finding(code, severity, layer, message), fixed)

    def add(self, finding: Finding, fixed: bool) -> None:
        self.findings.append(finding)
        if not fixed:
            self.unfixed.append(finding)


def diagnose(src: Source, assume: str | None = None) -> Diagnosis:
    """Look at headers, metadata and scales. assume: a format's name, or "modelopt", for the layers whose tensors alone
    do not tell what they are. Raises RequestError: there is no such format."""
    found = Diagnosis()
    header = _header_configs(src, found)
    moved = moved_layers(src)
    if moved:
        old, new = next(iter(moved.items()))
        found.note(
            "tensor-prefix",
            "",
            f"the scales or descriptions of {counted(len(moved), 'layer')} are called {old!r} and so on, their "
            f"weights {new!r}. The former are renamed.",
        )
    tensors = _tensor_configs(src, moved, found)
    coded = _undescribed(src, {**header, **tensors})
    origin = {new: old for old, new in moved.items()}
    for layer in dict.fromkeys([*tensors, *header, *moved.values(), *coded]):
        names = {**layer_names(src, origin.get(layer, layer)), **layer_names(src, layer)}
        stored = _settle(src, layer, names, (header.get(layer), tensors.get(layer)), assume, found)
        if stored is not None:
            found.layers[layer] = stored
            _tensor_steps(stored, found)
        said = header.get(layer) or tensors.get(layer)
        if layer not in found.layers and said and f"{layer}{CONFIG_SUFFIX}" not in found.drop:
            found.unsettled[layer] = said
    found.drop += [
        old + CONFIG_SUFFIX for old, new in moved.items() if new in found.layers and old + CONFIG_SUFFIX in src.tensors
    ]
    _header_state(src, header, found)
    _orphans(src, {old for old, new in moved.items() if new in found.layers}, found)
    _the_rest(src, found)
    return found


def _header_configs(src: Source, found: Diagnosis) -> dict[str, Config]:
    """The header's configs under the names that the tensors have."""
    text = src.metadata.get(HEADER_KEY)
    if text is None:
        return {}
    try:
        layers = header_object(text)["layers"]
    except InputFileError as err:
        found.note("header-json", "", f"{err} It is written anew from the tensors.")
        return {}
    configs = {layer: config for layer, config in layers.items() if isinstance(config, dict)}
    if len(configs) < len(layers):
        found.note(
            "header-json",
            "",
            f"of the {counted(len(layers), 'entry', 'entries')} of {HEADER_KEY}, "
            f"{len(layers) - len(configs)} are not objects and are left out.",
        )
    missing = [layer for layer in configs if f"{layer}.weight" not in src.tensors]
    if not missing:
        return configs
    for rename in prefix_changes():
        moved = {rename(layer): config for layer, config in configs.items()}
        if len(missing) == len(configs) and all(f"{layer}.weight" in src.tensors for layer in moved):
            found.note(
                "header-prefix",
                "",
                f"the header calls the layers {missing[0]!r} and so on; the tensors are called "
                f"{rename(missing[0])!r}. The header is renamed.",
            )
            return moved
    for layer in missing:
        found.note(
            "header-orphan", layer, f"{layer} is in {HEADER_KEY} and not in the file; the entry is removed.", "warning"
        )
    return {layer: config for layer, config in configs.items() if layer not in missing}


def _tensor_configs(src: Source, moved: Mapping[str, str], found: Diagnosis) -> dict[str, Config | None]:
    """Each comfy_quant tensor's object, by the name of the layer's weight; None for one that cannot be read."""
    configs: dict[str, Config | None] = {}
    for name, info in src.tensors.items():
        layer = name.removesuffix(CONFIG_SUFFIX)
        if layer != name:
            configs[moved.get(layer, layer)] = _read_config(src, layer, info, found)
    return configs


def _read_config(src: Source, layer: str, info: TensorInfo, found: Diagnosis) -> Config | None:
    raw = src.read_bytes(info.name)
    if info.dtype != "U8" or len(info.shape) != 1:
        found.note(
            "config-dtype",
            layer,
            f"{info.name} is {info.dtype} {list(info.shape)}; ComfyUI reads 1-D U8. It is written so.",
        )
    try:
        config, repairs = decode_config(raw, layer, lenient=True)
    except InputFileError as err:
        found.note("config-json", layer, f"{err} It is written anew, from the header or from the tensors.")
        return None
    for repair in repairs:
        found.note("config-nul" if "NUL" in repair else "config-nested", layer, repair)
    return config


def _undescribed(src: Source, described: Mapping[str, Any]) -> list[str]:
    """Layers with coded weights and scales of our names that nothing describes."""
    return [
        layer
        for name, info in src.tensors.items()
        if (layer := name.removesuffix(".weight")) != name
        and layer not in described
        and info.dtype in CODED
        and any(f"{layer}.{s}" in src.tensors for s in ("weight_scale", "weight_s_rel"))
        and f"{layer}.weight.absmax" not in src.tensors
    ]


def _settle(
    src: Source,
    layer: str,
    names: dict[str, str],
    described: tuple[Config | None, Config | None],
    assume: str | None,
    found: Diagnosis,
) -> StoredLayer | None:
    """The layer under the description that fits its tensors. Where both fit, the header's: ComfyUI takes that one."""
    header, tensor = described
    errors: list[InputFileError] = []
    fitting: list[StoredLayer | None] = []
    for config in (header, tensor):
        if config is not None and "format" not in _flat(config):
            fitting.append(None)
            errors.append(InputFileError(f"{layer}: its description in the header has no format."))
            continue
        try:
            fitting.append(describe_layer(src, layer, _flat(config), names) if config is not None else None)
        except InputFileError as err:
            fitting.append(None)
            errors.append(err)
    from_header, from_tensor = fitting
    chosen = from_header or from_tensor
    if chosen and header is not None and tensor is not None and not same_json(_flat(header), tensor):
        why = "as ComfyUI uses it"
        if chosen is not from_header:
            why = "as it fits the data"
        elif from_tensor and all(tensor.get(key) == value for key, value in _flat(header).items()):
            # convert_to_quant 1.3.1 left per_row out of the header
            chosen, why = from_tensor, "as it says more"
        found.note(
            "header-sync",
            layer,
            f"{layer}: the header says {json.dumps(header)}, the tensor {json.dumps(tensor)}; the "
            f"{'tensor' if chosen is from_tensor else 'header'}'s is kept, {why}.",
        )
    if chosen:
        return chosen
    return _infer(src, layer, names, (header, tensor), errors, assume, found)


def _flat(config: Config) -> Config:
    params = config.get("params")
    return {**params, **{k: v for k, v in config.items() if k != "params"}} if isinstance(params, dict) else config


def _infer(
    src: Source,
    layer: str,
    names: dict[str, str],
    described: tuple[Config | None, ...],
    errors: list[InputFileError],
    assume: str | None,
    found: Diagnosis,
) -> StoredLayer | None:
    """A layer without a fitting description, from its tensors. errors: why the ones it has do not fit."""
    if "weight" not in names or src.tensors[names["weight"]].dtype not in CODED:
        _not_quantized(src, layer, names, found)
        return None
    infos = {suffix: src.tensors[name] for suffix, name in names.items()}
    form = Form.MODELOPT if assume == MODELOPT or (assume is None and is_modelopt(src)) else Form.BARE
    try:
        inferred = _assumed(infos, assume) if assume and form is Form.BARE else infer(layer, infos)
        config, reordered = inferred.config, inferred.format.modelopt_differs
        # A description that cannot be read still says that ComfyUI's order is meant: ModelOpt writes none.
        if reordered and form is Form.BARE and not assume and not errors and "comfy_quant" not in names:
            _require_swizzled(layer, inferred.format, infos)
        stored = describe_layer(src, layer, config, names, form if reordered else Form.BARE)
    except InputFileError as err:
        text = " ".join(_reason(src, one) for one in (*errors[:1], err))
        problem = err.problems[0]
        found.add(Finding("unknown-format", "error", layer, text, problem.setting, problem.remedy), fixed=False)
        return None
    if any((config or {}).get("full_precision_matrix_mult") is True for config in described):
        stored = replace(stored, config={**stored.config, "full_precision_matrix_mult": True})
    if errors:
        found.note(
            "config-format",
            layer,
            f"{_reason(src, errors[0])} Its tensors are {json.dumps(config)}, which is written.",
        )
    else:
        found.note(
            "config-missing", layer, f"{layer} has scales and no description; its tensors are {json.dumps(config)}."
        )
    return stored


def _reason(src: Source, error: InputFileError) -> str:
    """Without the path, which the report names once, and without the remedy, which the finding carries."""
    return error.problems[0].text.removeprefix(f"{src.path}: ")


def _require_swizzled(layer: str, fmt: Format, infos: Mapping[str, TensorInfo]) -> None:
    if fmt.modelopt_order_fits(infos):
        raise InputFileError(
            f"{layer}: {fmt.name.upper()} without metadata: ComfyUI and ModelOpt order nibbles and block scales "
            f"differently, and these shapes fit both: {fmt.name} (ComfyUI's) or modelopt.",
            "assume",
            Remedy.SAY_FORMAT,
        )


def _assumed(infos: Mapping[str, TensorInfo], assume: str) -> Inferred:
    fmt = get_format(assume)
    shape = fmt.shape_from({suffix: info.shape for suffix, info in infos.items()}, {})
    try:
        return Inferred(fmt, fmt.for_shape(shape).config(shape, torch.float32))
    except RequestError as err:
        raise InputFileError(str(err)) from err


def _not_quantized(src: Source, layer: str, names: Mapping[str, str], found: Diagnosis) -> None:
    """A description beside a weight that is whole, or beside none."""
    weight = src.tensors.get(f"{layer}.weight")
    if weight is None:
        found.note(
            "weight-missing",
            layer,
            f"{layer} is described as quantized and has no weight. Take the file from its source again.",
            fixed=False,
        )
        return
    scales = [name for suffix, name in names.items() if suffix not in ("weight", "comfy_quant")]
    harmless = all(
        src.tensors[name].dtype in ("F32", "BF16", "F16") and bool((src.read(name) == 1).all()) for name in scales
    )
    found.note(
        "not-quantized",
        layer,
        f"{layer} is described as quantized, and its weight is {weight.dtype}. "
        + (
            "Description and scales are removed."
            if harmless
            else "Its scales are not 1, so the weight may be codes that "
            "were cast: nothing is changed. Take the file from its source again."
        ),
        fixed=harmless,
    )
    if harmless:
        found.drop += [name for suffix, name in names.items() if suffix != "weight"]


def _tensor_steps(stored: StoredLayer, found: Diagnosis) -> None:
    for suffix, name in stored.names.items():
        part = stored.parts.get(suffix)
        if part is None or stored.form is Form.MODELOPT:
            continue
        info = part.found
        if part.steps is None:
            found.note(
                "tensor-shape",
                stored.layer,
                f"{name} is {info.dtype} {list(info.shape)}, which {stored.format.name} "
                "cannot use. Take the file from its source again.",
                fixed=False,
            )
            found.layers.pop(stored.layer, None)
            return
        for step in part.steps:
            severity = "error" if info.shape != (1,) else "warning"
            text = f"{name} ({info.dtype} {list(info.shape)}): {WORDS[step]}."
            found.note(step.value, stored.layer, text, severity)
    if stored.form in (Form.COMFY_4BIT, Form.HYBRID_MXFP8, Form.MODELOPT):
        text = f"{stored.layer} is in the {stored.form.value} form; it is rewritten."
        found.note("older-form", stored.layer, text, "warning")


def _header_state(src: Source, header: Mapping[str, Config], found: Diagnosis) -> None:
    absent = [layer for layer in found.layers if layer not in header]
    if absent and HEADER_KEY not in src.metadata:
        found.note("header-missing", "", f"the header has no {HEADER_KEY}; it is written.", "warning")
    elif absent:
        found.note(
            "header-incomplete",
            "",
            f"{HEADER_KEY} lacks {counted(len(absent), 'layer')}, such as {absent[0]}; what is missing is added.",
        )
    for layer in found.layers:
        if layer in header and layer + CONFIG_SUFFIX not in src.tensors:
            found.note(
                "config-tensor-missing",
                layer,
                f"{layer} is described in the header only; its tensor is written.",
                "warning",
            )


def _orphans(src: Source, settled: set[str], found: Diagnosis) -> None:
    suffixes = {s for s in QUANT_SUFFIXES if s not in ("weight", "comfy_quant")}
    for name in src.tensors:
        layer, _, last = name.rpartition(".")
        weight = src.tensors.get(f"{layer}.weight")
        if last not in suffixes or layer in found.layers or layer in settled:
            continue
        if name in found.drop or f"{layer}{CONFIG_SUFFIX}" in src.tensors:
            continue
        if weight is not None and weight.dtype not in CODED:
            found.note(
                "orphan", layer, f"{name} stands beside a {weight.dtype} weight and serves nothing; it is removed."
            )
            found.drop.append(name)
        elif weight is None:
            found.note(
                "orphan", layer, f"{name} has no weight beside it. Take the file from its source again.", fixed=False
            )


def _the_rest(src: Source, found: Diagnosis) -> None:
    """What the loader's rules find besides, and nobody can repair; legacy forms, which migrate converts."""
    for finding in check_file(src.path).findings:
        if finding.code in BEYOND_REPAIR:
            found.add(finding, fixed=False)
    codes = codes_problem(src, found.layers)
    if codes is not None and not any(finding.code == "foreign" for finding in found.findings):
        found.note("undescribed", "", codes, fixed=False)
    if found.layers and (problem := diffusers_warning(src.tensors)):
        found.note("diffusers-names", "", problem, "warning", fixed=False)
    legacy = [name for name in src.tensors if name.endswith(".scale_weight")]
    if legacy:
        found.note(
            "legacy",
            "",
            f"{counted(len(legacy), 'layer is', 'layers are')} of the legacy form. "
            "`quantpress migrate` converts them.",
            "warning",
            fixed=False,
        )
