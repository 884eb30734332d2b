"""The older tool's options -> commands of ours, and sentences about what differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...quant_core.checkpoint.suffixes import SUFFIX, without_suffix
from ...quant_core.errors import RequestError
from .formats import Formats, Given
from .options import OPTIONS

MODES = (
    "convert_fp8_scaled",
    "convert_int8_scaled",
    "legacy_input_add",
    "cleanup_fp8_scaled",
    "edit_quant",
    "make_hybrid_mxfp8",
    "actcal",
)
_REFUSED = {
    "make_hybrid_mxfp8": "hybrid MXFP8 is not written: ComfyUI has no such format. Such files are read, and "
    "`quantpress migrate` turns them into mxfp8.",
}
# Ours has them under the same names.
_LEARNED = (
    "lr",
    "lr_schedule",
    "top_p",
    "min_k",
    "max_k",
    "lr_gamma",
    "lr_patience",
    "lr_factor",
    "lr_min",
    "lr_cooldown",
    "lr_threshold",
    "lr_adaptive_mode",
    "lr_threshold_mode",
    "lr_shape_influence",
    "early_stop_loss",
    "early_stop_lr",
    "early_stop_stall",
    "scale_refinement",
)
_LEARNED_ALL = (*_LEARNED, "num_iter", "optimizer", "scale_optimization")


@dataclass(frozen=True, slots=True)
class Translation:
    """steps: arguments of quantpress, to be run in order. scratch: files between steps, to be removed at the end.

    notes: sentences about options that had no effect or mean something else here.
    """

    steps: tuple[tuple[str, ...], ...]
    scratch: tuple[Path, ...]
    notes: tuple[str, ...]


def translate(options: Mapping[str, Any], layers: Iterable[str]) -> Translation:
    """options: those given, by the table's `dest`. layers: names of the model's linear layers.

    Raises RequestError: no input, two modes, a mode that is not offered.
    """
    given = Given(options)
    modes = [mode for mode in MODES if given.take(mode)]
    if "input" not in options:
        raise RequestError("--input is missing: give the model with -i.")
    if len(modes) > 1:
        raise RequestError(f"{' and '.join('--' + mode.replace('_', '-') for mode in modes)} cannot be used together.")
    for mode in modes:
        if mode in _REFUSED:
            raise RequestError(f"--{mode.replace('_', '-')}: {_REFUSED[mode]}")
    steps, scratch = _mode(modes[0], given) if modes else _quantize(given, list(layers))
    return Translation(tuple(map(tuple, steps)), tuple(scratch), tuple([*given.notes, *_idle(given, modes)]))


def _mode(mode: str, given: Given) -> tuple[list[list[str]], list[Path]]:
    source = given.take("input")
    suffix = {
        "convert_fp8_scaled": "_comfy",
        "convert_int8_scaled": "_comfy",
        "edit_quant": "_edited",
        "legacy_input_add": "_scale_input",
        "cleanup_fp8_scaled": "_cleaned",
        "actcal": "_calibrated",
    }[mode]
    step = [source, given.take("output") or _named(source, suffix)]
    if mode == "edit_quant":
        step = [
            "edit",
            *step,
            *_pairs(given, ("add_keys", "--add"), ("remove_keys", "--remove"), ("quant_filter", "--layers")),
        ]
        step += ["--header", "build"] if given.take("save_quant_metadata") else []
    elif mode == "actcal":
        source_of = _pairs(given, ("actcal_lora", "--lora")) or ["--simulate"]
        step = [
            "calibrate",
            *step,
            *source_of,
            *_pairs(
                given,
                ("actcal_samples", "--samples"),
                ("actcal_seed", "--seed"),
                ("actcal_percentile", "--percentile"),
            ),
        ]
    elif mode == "legacy_input_add":
        step = ["cleanup", *step, "--only-scale-input"]
    elif mode == "cleanup_fp8_scaled":
        step = ["cleanup", *step, "--marker", str(given.take("scaled_fp8_marker") or 0)]
        step += ["--scale-input"] if given.take("input_scale") else []
        step += ["--keep-shapes"] if given.take("no_normalize_scales") else []
    else:
        step = ["migrate", *step, *_pairs(given, ("hp_filter", "--hp-filter"))]
        step += ["--full-precision-mm"] if given.take("full_precision_mm") else []
        scale = given.input_scale()
        step += ["--input-scale", scale] if scale else []
        if given.take("block_size") is not None:
            given.note("--block_size: the block size is read from the shapes of the scales.")
        if given.take("kernel_backend"):
            given.note("--kernel_backend: block or row scales are told apart by their shapes.")
        given.take("save_quant_metadata")
    return [step + _overwrite(given)], []


def _pairs(given: Given, *pairs: tuple[str, str]) -> list[str]:
    return [word for dest, ours in pairs if (value := given.take(dest)) is not None for word in (ours, str(value))]


def _quantize(given: Given, layers: list[str]) -> tuple[list[list[str]], list[Path]]:
    source, formats = given.take("input"), Formats(given)
    main = formats.main()
    dry = given.take("dry_run")
    if dry == "create-template":
        return [
            [
                "template",
                source,
                given.take("output") or f"{without_suffix(source, SUFFIX)}_layer_config_template.json",
                *_overwrite(given),
            ]
        ], []
    simple = bool(given.take("simple"))
    target = given.take("output") or _named(source, formats.auto_suffix(simple))
    step = ["quantize", source, target, *main, *_rounding(given, simple), *formats.choices(layers)]
    step += _pairs(given, ("layer_config", "--layer-config"), ("device", "--device"))
    step += _residual(given, target)
    if given.take("full_precision_matrix_mult"):
        step += ["--add-config", "'full_precision_matrix_mult': true"]
    seed = given.take("manual_seed")
    if seed is not None and seed >= 0:
        step += ["--seed", str(seed)]
    elif seed is not None:
        given.note(
            "--manual_seed -1: there is no random seed here; seed 0 is used, and the same input gives the same bytes."
        )
    given.take("save_quant_metadata")
    overwrite = _overwrite(given)
    if dry:
        return [[*step, "--dry-run"]], []
    return _with_input_scales(step, target, given, formats, overwrite)


def _with_input_scales(
    step: list[str], target: str, given: Given, formats: Formats, overwrite: list[str]
) -> tuple[list[list[str]], list[Path]]:
    """input_scale goes into the finished file in a second step."""
    wanted, file = given.input_scale(), given.take("input_scales")
    if wanted and not formats.fp8:
        given.note("--input_scale, or the filter that implies it: only FP8 layers take an input_scale from here.")
        wanted = None
    if not wanted and file is None:
        return [[*step, *overwrite]], []
    scratch = Path(target).with_name(f"{Path(target).stem}.without_input_scale.safetensors")
    step[2] = str(scratch)
    second = (
        ["migrate", str(scratch), target, "--input-scale", wanted]
        if wanted
        else ["calibrate", str(scratch), target, "--input-scales", file]
    )
    if wanted and file is not None:
        raise RequestError("--input_scale and --input-scales both set input_scale. Use one of them.")
    return [[*step, "--overwrite"], [*second, *overwrite]], [scratch]


def _residual(given: Given, target: str) -> list[str]:
    """What quantizing lost, as a LoRA; the older tool took only the first block unless told otherwise."""
    if not given.take("extract_lora"):
        return []
    words = ["--residual-lora", given.take("lora_output") or without_suffix(target, SUFFIX) + "_lora.safetensors"]
    words += _pairs(given, ("lora_rank", "--residual-rank"))
    depth, regex = given.take("lora_depth"), given.take("lora_target")
    words += ["--option", f"residual_depth={1 if depth is None else depth}"]
    return words + (["--option", f"residual_target={regex}"] if regex else [])


def _rounding(given: Given, simple: bool) -> list[str]:
    searched = given.value("scale_optimization") in ("iterative", "joint")
    if given.value("scale_optimization") == "dualround":
        given.note("--scale-optimization dualround: learned rounding is done once; a second pass is not offered.")
    if simple:
        unused = [name for name in _LEARNED_ALL if given.take(name) is not None]
        if unused:
            given.note(f"{', '.join('--' + name for name in unused)}: no effect with --simple.")
        return []
    given.take("scale_optimization")
    words = ["--scales", "search"] if searched else []
    words += ["--rounding", "learned"]
    iterations, optimizer = given.take("num_iter"), given.take("optimizer")
    if optimizer == "prodigy":
        given.note("--optimizer prodigy: not offered; the default optimizer is used.")
    elif optimizer:
        words += ["--option", f"optimizer={optimizer}"]
    words += ["--option", f"iterations={iterations}"] if iterations is not None else []
    return words + [
        word
        for name in _LEARNED
        if (value := given.take(name)) is not None
        for word in ("--option", f"{name}={value}")
    ]


def _overwrite(given: Given) -> list[str]:
    return ["--overwrite"] if given.take("overwrite") else []


def _named(source: str, suffix: str) -> str:
    return without_suffix(source, SUFFIX) + suffix + ".safetensors"


def _idle(given: Given, modes: list[str]) -> list[str]:
    """A sentence for every option that was given and did nothing."""
    table = {option.dest: option for option in OPTIONS}
    where = f" with --{modes[0].replace('_', '-')}" if modes else " without the option it belongs to"
    return [
        f"{table[dest].names[0]}: no effect: {table[dest].idle}."
        if table[dest].idle
        else f"{table[dest].names[0]}: no effect{where}."
        for dest in given.left()
    ]
