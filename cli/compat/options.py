"""Every option of convert_to_quant, of the version 1.3.1 and of the older ones, as a table.

Source: its parser and its development log; names, defaults and choices are facts of its command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...quant_core.policy.presets import PRESETS

SECTIONS = {
    "standard": "Standard",
    "learned": "Learned rounding",
    "experimental": "Formats, custom and fallback layers",
    "filters": "Model filters",
    "advanced": "Learning rate, early stop, scales",
    "modes": "Modes",
    "lora": "LoRA extraction",
}


@dataclass(frozen=True, slots=True)
class Option:
    """names: every spelling beside those with - and _ exchanged. kind: bool, int, float or str.

    help: what it does HERE. idle: why it does nothing here; such an option is named when it is used.
    """

    names: tuple[str, ...]
    section: str
    help: str = ""
    kind: type = bool
    default: Any = None
    choices: tuple[Any, ...] = ()
    idle: str = ""

    @property
    def dest(self) -> str:
        return self.names[0].lstrip("-").replace("-", "_")

    @property
    def spellings(self) -> tuple[str, ...]:
        found = dict.fromkeys(self.names)
        for name in self.names:
            if name.startswith("--"):
                found |= dict.fromkeys(("--" + name[2:].replace("_", "-"), "--" + name[2:].replace("-", "_")))
        return tuple(found)


def _flag(section: str, name: str, help: str = "", *names: str, idle: str = "") -> Option:
    return Option((name, *names), section, help, idle=idle)


def _value(
    section: str,
    name: str,
    kind: type,
    help: str = "",
    *names: str,
    default: Any = None,
    choices: tuple[Any, ...] = (),
    idle: str = "",
) -> Option:
    return Option((name, *names), section, help, kind, default, choices, idle)


_TYPES = ("fp8", "int8", "mxfp8", "nvfp4", "nf4", "fp4", "af4")
_MODES = ("tensor", "row", "block", "block3d", "block2d")
_BIAS = "biases stay as they are: no samples are drawn to correct them"
_NO_PRODIGY = "settings of the Prodigy optimizer, which is not offered"

_STANDARD = (
    _value("standard", "--input", str, "the model, *.safetensors", "-i"),
    _value("standard", "--output", str, "the new file; by default a name made from the input's", "-o"),
    _flag("standard", "--comfy_quant", idle="comfy_quant metadata is always written"),
    _flag("standard", "--simple", "round to nearest"),
    _flag("standard", "--full_precision_matrix_mult", "set full_precision_matrix_mult in the metadata", "-fpmm"),
    _flag("standard", "--heur", idle="layers whose shape a format cannot take are always kept, and named"),
    _value("standard", "--device", str, "auto, cpu or cuda"),
    _value(
        "standard",
        "--verbose",
        str,
        default="NORMAL",
        choices=("DEBUG", "VERBOSE", "NORMAL", "MINIMAL"),
        idle="the summary is the same; --report and --json tell more",
    ),
    _value("standard", "--manual_seed", int, "the seed; the same one gives the same bytes", default=-1),
    _flag("standard", "--use_speed", idle=_NO_PRODIGY),
    _flag(
        "standard",
        "--save-quant-metadata",
        "with --edit-quant: write the header from the tensors; elsewhere it is always written",
    ),
    _flag("standard", "--verbose-pinned", idle="there are no pinned transfers to report"),
    _flag("standard", "--low-memory", "", "-lm", idle="every conversion streams one layer at a time"),
)
_LEARNED = (
    _flag("learned", "--full_matrix", idle="the projection is computed as the rounding method needs it"),
    _value("learned", "--calib_samples", int, default=3072, idle=_BIAS),
    _flag("learned", "--calib_cpu", idle=_BIAS),
    _value(
        "learned",
        "--optimizer",
        str,
        "original, adamw or radam; prodigy runs as original",
        default="prodigy",
        choices=("original", "adamw", "radam", "prodigy"),
    ),
    _value("learned", "--num_iter", int, "iterations per tensor", "-n"),
    _value("learned", "--lr", float, "learning rate"),
    _value("learned", "--lr_schedule", str, "", choices=("adaptive", "exponential", "plateau")),
    _value("learned", "--top_p", float, "share of the singular vectors that count"),
    _value("learned", "--min_k", int, "at least so many"),
    _value("learned", "--max_k", int, "at most so many"),
)
_ADVANCED = (
    _value("advanced", "--lr_gamma", float, "exponential: decay"),
    _value("advanced", "--lr_patience", int, "plateau"),
    _value("advanced", "--lr_factor", float, "plateau, adaptive"),
    _value("advanced", "--lr_min", float, "plateau"),
    _value("advanced", "--lr_cooldown", int, "plateau, adaptive"),
    _value("advanced", "--lr_threshold", float, "improvement needed"),
    _value("advanced", "--lr_adaptive_mode", str, "adaptive", choices=("simple-reset", "no-reset")),
    _value("advanced", "--lr-threshold-mode", str, "plateau", choices=("rel", "abs")),
    _value("advanced", "--lr-shape-influence", float, "0 is off"),
    _value("advanced", "--early-stop-loss", float, "", "-esloss"),
    _value("advanced", "--early-stop-lr", float, "", "-eslr"),
    _value("advanced", "--early-stop-stall", int, "", "-esstall"),
    _value("advanced", "--scale-refinement", int, "rounds of scale refinement"),
    _value(
        "advanced",
        "--scale-optimization",
        str,
        "iterative and joint search the scales",
        default="fixed",
        choices=("fixed", "iterative", "joint", "dualround"),
    ),
)
_MODES_TABLE = (
    _flag("modes", "--make-hybrid-mxfp8", "refused: such files are read and turned into mxfp8, not written"),
    _value("modes", "--tensor-scales", str, idle="it belongs to --make-hybrid-mxfp8"),
    _flag("modes", "--convert-fp8-scaled", "legacy fp8_scaled -> comfy_quant"),
    _value("modes", "--hp-filter", str, "a regex of weights that must be in high precision"),
    _flag("modes", "--full-precision-mm", "with --convert-fp8-scaled: set full_precision_matrix_mult"),
    _flag("modes", "--convert-int8-scaled", "legacy INT8 -> comfy_quant"),
    _flag("modes", "--legacy_input_add", "add scale_input 1.0 to a legacy file"),
    _flag("modes", "--cleanup-fp8-scaled", "tidy a legacy file"),
    _value("modes", "--scaled-fp8-marker", int, "elements of the marker", default=0, choices=(0, 2)),
    _flag("modes", "--actcal", "write input scales from random inputs; a captured calibration is better"),
    _value("modes", "--actcal-samples", int, "random rows per layer", default=64),
    _value("modes", "--actcal-percentile", float, "of the magnitudes", default=99.9),
    _value("modes", "--actcal-lora", str, "a LoRA whose directions are inputs"),
    _value("modes", "--actcal-seed", int, "of the random inputs", default=42),
    _value("modes", "--actcal-device", str, idle="the simulation runs where the file is read, on the CPU"),
    _flag("modes", "--edit-quant", "edit the metadata"),
    _value("modes", "--remove-keys", str, "comma-separated"),
    _value("modes", "--add-keys", str, "\"'key': value, ...\""),
    _value("modes", "--quant-filter", str, "a regex of the layers to edit"),
    _value(
        "modes",
        "--dry-run",
        str,
        "analyze shows the plan; create-template writes a layer config",
        choices=("analyze", "create-template"),
    ),
)
_LORA = (
    _flag("lora", "--extract-lora", "also write what quantizing lost as a low-rank LoRA"),
    _value("lora", "--lora-rank", int, "its rank", default=32),
    _value("lora", "--lora-target", str, "a regex of its layers"),
    _value("lora", "--lora-depth", int, "only blocks with a smaller number", default=1),
    _value("lora", "--lora-ar-threshold", float, idle="layers of every shape take part; name them with --lora-target"),
    _value("lora", "--lora-output", str, "by default the output's name with _lora"),
)
_EXPERIMENTAL = (
    _flag("experimental", "--fp8", idle="FP8 is what is written when no other format is named"),
    _flag("experimental", "--int8", "INT8; see --scaling_mode"),
    _flag("experimental", "--nf4", "NF4"),
    _flag("experimental", "--fp4", "FP4 of bitsandbytes"),
    _flag("experimental", "--af4", "AF4"),
    _flag("experimental", "--nvfp4", "NVFP4"),
    _flag("experimental", "--mxfp8", "MXFP8"),
    _value(
        "experimental",
        "--kernel_backend",
        str,
        "int8: blockwise or lodewise scales",
        choices=("blockwise", "lodewise"),
    ),
    _flag("experimental", "--convrot", "int8 per row: rotate the weights"),
    _value("experimental", "--convrot-group-size", int, "rotation group", default=256),
    _flag(
        "experimental",
        "--dynamic-convrot",
        idle="a group that does not divide a layer is always replaced by the largest one that does",
    ),
    _value("experimental", "--fallback", str, "the format of layers that would be kept", choices=_TYPES),
    _value("experimental", "--custom-layers", str, "a regex: layers that get --custom-type"),
    _value("experimental", "--exclude-layers", str, "a regex: layers to keep, or for --fallback"),
    _value("experimental", "--custom-type", str, "", choices=_TYPES),
    _value("experimental", "--custom-block-size", int, ""),
    _value("experimental", "--custom-scaling-mode", str, "", choices=_MODES),
    _flag("experimental", "--custom-simple", "round custom layers to nearest"),
    _flag("experimental", "--custom-heur", idle="layers whose shape a format cannot take are always kept, and named"),
    _flag("experimental", "--custom-full-precision-mm", "", "--custom-fpmm"),
    _flag("experimental", "--custom-convrot", "rotate custom int8 layers"),
    _value(
        "experimental",
        "--custom-convrot-group-size",
        int,
        default=256,
        idle="the default group is used, or the largest that divides the layer",
    ),
    _value("experimental", "--fallback-block-size", int, ""),
    _flag("experimental", "--fallback-simple", ""),
    _flag("experimental", "--input_scale", "in the conversions: write input_scale where it is missing"),
    _value("experimental", "--scaling_mode", str, "scales per tensor, row or block", choices=_MODES),
    _value("experimental", "--block_size", int, "weights per scale", "--group_size"),
    _flag("experimental", "--no-normalize-scales", "with --cleanup-fp8-scaled: leave the scales' shapes"),
    _value("experimental", "--input-scales", str, "nvfp4: input scales from JSON or another model"),
    _value("experimental", "--layer-config", str, "JSON: regex -> settings"),
    _flag("experimental", "--fullmatch", "the whole name must match --custom-layers and --exclude-layers"),
)
_FILTERS = tuple(
    _flag("filters", f"--{name}", f"{preset.category}: keep what this model needs in high precision")
    for name, preset in PRESETS.items()
)

OPTIONS = (*_STANDARD, *_LEARNED, *_EXPERIMENTAL, *_FILTERS, *_ADVANCED, *_MODES_TABLE, *_LORA)
HELP_FLAGS = {
    "standard": ("-h", "--help"),
    "learned": ("-hl", "--help-learned"),
    "experimental": ("-he", "--help-experimental"),
    "filters": ("-hf", "--help-filters"),
    "advanced": ("-ha", "--help-advanced"),
    "modes": ("-hm", "--help-modes"),
    "lora": ("-hlr", "--help-lora"),
}
