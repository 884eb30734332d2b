"""The recipe's widgets, made from the registries, and their values made into a Recipe and a Policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from comfy_api.latest import io

from ...quant_core.algorithms.choosers import Chooser
from ...quant_core.algorithms.rounders import Rounder
from ...quant_core.calibration.use import CalibrationUse
from ...quant_core.formats import all_formats, get_format
from ...quant_core.formats.base import Format
from ...quant_core.pipeline.request import leaves_all_biases
from ...quant_core.policy.general import Policy
from ...quant_core.policy.layer_config import parse_layer_config
from ...quant_core.policy.presets import PRESETS
from ...quant_core.policy.recipe import AUTO, ROUNDING, SCALES, Recipe, parse_recipe
from .folders import stamp
from .handles import CalibrationHandle, CalibrationType, spool_of
from .schema import rare

DEFAULT_FORMAT = "int8_convrot"
AUTOMATIC = "automatic"
KEEP = "keep in source dtype"
NO_PRESET = "none"
LAYER_CONFIG_EXAMPLE = '{"attn": {"format": "int8_rowwise"}, "\\\\.0\\\\.": {"skip": true}}'
_TYPICAL = (3072, 3072)


def formats_tooltip() -> str:
    lines = ["What the weights become. Fewer bits: smaller file, less memory, larger error."]
    for fmt in all_formats():
        where = "stock ComfyUI" if fmt.runtime.native_since else "ComfyUI with QuantPress"
        lines.append(f"{fmt.name}: {fmt.title}, {fmt.bits_per_weight(_TYPICAL):.2f} bits, loads in {where}")
    return "\n".join(lines)


def methods_tooltip(question: str, methods: Mapping[str, type[Chooser] | type[Rounder]]) -> str:
    return " ".join([question, *(f"{name!r} {method.explain}" for name, method in methods.items())])


def rounding_tooltip() -> str:
    """What serves another aim than quality comes last."""
    quality_first = sorted(ROUNDING.items(), key=lambda item: item[1].unbiased)
    return methods_tooltip("How weights are rounded.", dict(quality_first))


def sizes() -> list[str]:
    """Every group size and rotation group that some format offers."""
    offered = {
        size for fmt in all_formats() for size in (*fmt.group_sizes, *(() if fmt.group_sizes else fmt.rotations))
    }
    return [AUTOMATIC, *map(str, sorted(offered))]


def keeps_shape(fmt: Format) -> bool:
    """Whether a weight is stored with its own shape, as a layer needs that model detection looks at."""
    return fmt.tensor_specs((272, 1024))[0].shape == (272, 1024) and fmt.problem((272, 1024)) is None


def widgets() -> list[Any]:
    """The inputs of Quantize Model."""
    return [
        io.Combo.Input(
            "format", options=[fmt.name for fmt in all_formats()], default=DEFAULT_FORMAT, tooltip=formats_tooltip()
        ),
        io.Combo.Input(
            "group_size",
            options=sizes(),
            default=AUTOMATIC,
            tooltip=(
                "How many weights share a scale (for rotated formats: the rotation group). Smaller groups: less "
                "error, slightly larger file. 'automatic' takes the format's default; a size that the format lacks is "
                "refused."
            ),
        ),
        io.Combo.Input(
            "scales",
            options=list(SCALES),
            default=AUTO,
            tooltip=methods_tooltip("How scales are chosen.", SCALES),
        ),
        io.Combo.Input(
            "rounding",
            options=list(ROUNDING),
            default=AUTO,
            tooltip=rounding_tooltip(),
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**31 - 1,
            control_after_generate=False,
            tooltip=("Drives every random choice. The same source, recipe and seed give the same bytes."),
        ),
        io.String.Input(
            "keep",
            default="",
            multiline=False,
            tooltip=(
                "Layers that stay as they are, as a regular expression searched in their names, for example "
                "attn|blocks\\.0\\. . A connected text may hold several, one per line. Keeping more: better quality, "
                "larger file. Norms, embeddings, input and output layers are kept anyway."
            ),
        ),
        io.String.Input(
            "only",
            default="",
            multiline=False,
            tooltip=(
                "If filled: only layers that match this regular expression are quantized, even those that would be "
                "kept by default. For experiments, and for sparing all but the largest layers."
            ),
        ),
        io.Combo.Input(
            "fallback",
            options=[KEEP, *(fmt.name for fmt in all_formats() if keeps_shape(fmt))],
            default=KEEP,
            tooltip=(
                "For layers that cannot take the format: their shape does not fit, or ComfyUI recognises the model by "
                "it. Keeping them is safest; an 8-bit format saves a little more space."
            ),
        ),
        io.Combo.Input(
            "device",
            options=devices(),
            default="auto",
            tooltip=(
                "Where the arithmetic runs. 'auto' takes ComfyUI's own device: fastest, and it may unload models to "
                "make room. 'cpu' leaves the GPU alone; slower."
            ),
        ),
        CalibrationType.Input(
            "calibration",
            optional=True,
            tooltip=(
                "From Collect Calibration or Load Calibration: what flows into the layers of this very model. Scales "
                "and rounding then lower the error of what comes out of them."
            ),
        ),
        io.Boolean.Input(
            "bias_correction",
            default=True,
            optional=True,
            **rare(io.Boolean.Input),
            tooltip=(
                "With a calibration: the mean error of a layer's output moves into its bias, where that helps on "
                "inputs kept aside. Costs nothing in size or speed. Left out with residual_lora, which brings the "
                "mean back itself."
            ),
        ),
        io.Boolean.Input(
            "input_scales",
            default=False,
            optional=True,
            **rare(io.Boolean.Input),
            tooltip=(
                "With a calibration: write input scales for FP8 and NVFP4. Needed for FP8 when the report warns that "
                "inputs saturate; otherwise it changes little."
            ),
        ),
        io.Combo.Input(
            "preset",
            options=[NO_PRESET, *PRESETS],
            default=NO_PRESET,
            optional=True,
            **rare(io.Combo.Input),
            tooltip=(
                "Also keeps the layers that older converters keep for this family of models: closer to their files, "
                "slightly larger. 'none' is right for most: the general rules know the sensitive layers of every "
                "family."
            ),
        ),
        io.String.Input(
            "layer_config",
            optional=True,
            force_input=True,
            tooltip=(
                "JSON, from any node that gives text: a format of their own for single layers, by regular expressions "
                f"on their names, like {LAYER_CONFIG_EXAMPLE} . The most specific one wins, over keep and only too; "
                "_default replaces the format above. For mixed precision: more bits where it hurts."
            ),
        ),
        io.Int.Input(
            "residual_lora",
            default=0,
            min=0,
            max=256,
            optional=True,
            **rare(io.Int.Input),
            tooltip=(
                "Rank of a LoRA that gives back part of what quantizing loses; 0 makes none. Save Quantized Model "
                "writes it into models/loras. Load it with Load LoRA (Bypass, Model Only); the usual Load LoRA rounds "
                "it into the weights, which is worse than none. The larger the rank, the closer to the original, and "
                "the slower. Take rounding 'nearest' with it, and a calibration for ranks below 64: on top of 'gptq' "
                "it measured worse than nothing."
            ),
        ),
    ]


def devices() -> list[str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["auto", "cpu", *(f"cuda:{index}" for index in range(count))]


@dataclass(frozen=True, slots=True)
class Settings:
    """The widgets' values, checked."""

    recipe: Recipe
    policy: Policy
    device: str
    calibration: CalibrationUse | None = None
    preset: str = NO_PRESET

    @property
    def residual(self) -> bool:
        """Whether a low-rank part is written beside the model."""
        return self.recipe.residual.rank > 0

    def describe(self) -> dict[str, Any]:
        """JSON values that decide the bytes of the result."""
        fallback = self.policy.fallback
        use = self.calibration
        calibration = None if use is None else [str(use.path), stamp(use.path), use.bias_correction, use.input_scales]
        return {
            "recipe": self.recipe.describe(),
            "calibration": calibration,
            "preset": self.preset,
            "keep": list(self.policy.keep),
            "only": list(self.policy.only),
            "rules": [rule.describe() for rule in self.policy.rules],
            "fallback": fallback.describe() if fallback else None,
            "device": self.device,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeInputs:
    """The values of `widgets`, by their names. The defaults are those of inputs that a saved workflow may lack."""

    format: str
    group_size: str
    scales: str
    rounding: str
    seed: int
    keep: str
    only: str
    fallback: str = KEEP
    device: str = "auto"
    calibration: CalibrationHandle | None = None
    bias_correction: bool = True
    input_scales: bool = False
    preset: str = NO_PRESET
    layer_config: str | None = None
    residual_lora: int = 0


def read_settings(inputs: RecipeInputs) -> Settings:
    """The inputs, checked. Raises RequestError that says which value to change."""
    fmt, rank = sized(inputs.format, inputs.group_size), inputs.residual_lora
    recipe = parse_recipe(fmt, inputs.scales, inputs.rounding, inputs.seed, {"residual_rank": rank} if rank else {})
    fallback = None
    if inputs.fallback != KEEP:
        fallback = parse_recipe(get_format(inputs.fallback), inputs.scales, inputs.rounding, recipe.seed)
    policy = Policy(_patterns(inputs.keep), _patterns(inputs.only), fallback)
    layer_config = inputs.layer_config or ""
    if layer_config.strip():
        config = parse_layer_config(layer_config.encode("utf-8", "replace"), "layer_config", recipe)
        recipe, policy = config.default or recipe, replace(policy, rules=config.rules)
    use = None
    if inputs.calibration is not None:
        bias = inputs.bias_correction and not leaves_all_biases(recipe)
        use = CalibrationUse(spool_of(inputs.calibration), bias, inputs.input_scales)
    return Settings(recipe, policy, device_name(inputs.device), use, inputs.preset)


def sized(name: str, size: str) -> Format:
    """The format with the size of the widget as its group size, or as its rotation group where it has no groups."""
    fmt = get_format(name)
    if size == AUTOMATIC:
        return fmt
    return (
        fmt.with_options(rotation=int(size))
        if fmt.rotations and not fmt.group_sizes
        else fmt.with_options(group_size=int(size))
    )


def _patterns(text: str) -> tuple[str, ...]:
    """One regular expression per line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def device_name(choice: str) -> str:
    """ "auto" is ComfyUI's own device: it knows whether the user wants the CPU, or which GPU."""
    from comfy import model_management

    return str(model_management.get_torch_device()) if choice == "auto" else choice
