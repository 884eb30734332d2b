from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io, ui

from .jobs.calibrate_input_scales import (
    METHODS,
    NAME,
    NONE,
    SIMULATED,
    ScaleInputs,
    lora_file,
    plan,
    read_settings,
    scale_file,
    scale_files,
)
from .shared.folders import LORAS, list_models, stamp
from .shared.handles import CATEGORY, CalibrationType, QuantizedHandle, QuantizedType
from .shared.progress import NodeProgress
from .shared.run_tool import Tool, run_tool
from .shared.schema import rare, schema


class CalibrateInputScales(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressInputScales",
            display_name=NAME,
            category=CATEGORY,
            is_output_node=True,
            description=(
                "Writes input scales into a model that is quantized already, its weights untouched. FP8 without them "
                "cuts off large inputs; NVFP4 without them measures every call."
            ),
            search_aliases=["input_scale", "activation scale", "static", "saturation"],
            inputs=[
                QuantizedType.Input(
                    "quantized",
                    tooltip=(
                        "From Quantize Model, Open Quantized File, or any tool behind them. FP8 with one scale per "
                        "weight, and NVFP4: other formats do not use input scales."
                    ),
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=SIMULATED,
                    tooltip=(
                        "calibration: what really flows, by far the best. LoRA and simulated: guesses from the "
                        "weights, for when the model cannot be run; a bad guess costs quality. file: scales that "
                        "someone else found. weight scales: as some FP8 text encoder files have it."
                    ),
                ),
                io.Int.Input(
                    "samples",
                    default=64,
                    min=1,
                    max=1024,
                    **rare(io.Int.Input),
                    tooltip=(
                        "simulated, LoRA: random inputs per layer. More: slower, and the guess depends less on chance."
                    ),
                ),
                io.Float.Input(
                    "percentile",
                    default=99.9,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    **rare(io.Float.Input),
                    tooltip=(
                        "simulated, LoRA: which of the magnitudes still fits, 100 for the largest. Lower: finer "
                        "steps, but more inputs are cut off."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    **rare(io.Int.Input),
                    tooltip=("simulated, LoRA: of the random inputs. The same seed gives the same bytes."),
                ),
                io.Float.Input(
                    "captured_percentile",
                    default=100.0,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    **rare(io.Float.Input),
                    tooltip=(
                        "calibration: which of the captured magnitudes still fits. 100, the largest, was best "
                        "wherever we measured; less cuts off outliers, which costs more than finer steps gain."
                    ),
                ),
                io.Combo.Input(
                    "lora",
                    options=[NONE, *list_models(LORAS, shards=False)],
                    default=NONE,
                    tooltip=(
                        "LoRA: a LoRA of this very model. Its directions are taken as inputs of the layers that it "
                        "changes; all other layers get random inputs."
                    ),
                ),
                io.Combo.Input(
                    "file",
                    options=scale_files(),
                    default=NONE,
                    tooltip=(
                        "file: another quantized model with input scales, or a JSON object {layer: number} in "
                        "models/calibrations. Layers are found by any common spelling of their names."
                    ),
                ),
                io.Boolean.Input(
                    "preview",
                    default=False,
                    tooltip=(
                        "On: show the scales, write nothing, and let the nodes behind this one wait. Off: write a new "
                        "file, which takes disk space of the model's size."
                    ),
                ),
                CalibrationType.Input(
                    "calibration",
                    optional=True,
                    tooltip=(
                        "From Collect Calibration or Load Calibration, of this model. Whatever the method: layers "
                        "whose captured inputs the new scales cut off are named."
                    ),
                ),
            ],
            outputs=[
                QuantizedType.Output(
                    "quantized", tooltip="With input scales: to load, to save, or for the next tool."
                ),
                io.String.Output("table", tooltip="Layers with their scales, and warnings, as text."),
                io.String.Output(
                    "json", tooltip="Everything, for scripts; its `scales` are a file for this node's `file`."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, quantized: QuantizedHandle, preview: bool, **values: Any) -> io.NodeOutput:
        settings = read_settings(ScaleInputs(**values))
        progress = NodeProgress(cls.hidden.unique_id, "Input scales")
        tool = Tool(NAME, settings.describe(), preview, reads=settings.reads)
        outcome = run_tool(quantized, tool, progress, lambda src: plan(src, settings, progress))
        return io.NodeOutput(
            outcome.quantized, outcome.text, json.dumps(outcome.data, indent=1), ui=ui.PreviewText(outcome.text)
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str = NONE, file: str = NONE, **_: Any) -> str:
        return ";".join(stamp(path) for path in (lora_file(lora), scale_file(file)) if path is not None)
