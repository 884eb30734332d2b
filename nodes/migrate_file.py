from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..quant_core.tools.canonicalize import InputScale
from .jobs.migrate_file import FULL_PRECISION, INPUT_SCALES, LEGACY, NAME, NATIVE, MigrateSettings, plan
from .shared.handles import CATEGORY, QuantizedHandle, QuantizedType
from .shared.progress import NodeProgress
from .shared.run_tool import Tool, run_tool
from .shared.schema import rare, schema


class MigrateFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressMigrate",
            display_name=NAME,
            category=CATEGORY,
            is_output_node=True,
            description=(
                "Turns older and foreign quantized files into the form that ComfyUI writes today: legacy fp8_scaled "
                "and INT8, bitsandbytes, ModelOpt. Nothing is requantized: the weights decode to the same values."
            ),
            search_aliases=["fp8_scaled", "scaled_fp8", "bitsandbytes", "modelopt", "convert"],
            inputs=[
                QuantizedType.Input("quantized", tooltip="From Open Quantized File, or any tool behind it."),
                io.Combo.Input(
                    "target",
                    options=[NATIVE, LEGACY],
                    default=NATIVE,
                    tooltip=(
                        "comfy_quant: ComfyUI's own form, for every format. legacy fp8_scaled: for loaders that know "
                        "only that one; FP8 with one scale per weight alone has it. Quality is the same."
                    ),
                ),
                io.Combo.Input(
                    "full_precision",
                    options=list(FULL_PRECISION),
                    default="as it is",
                    tooltip=(
                        "For comfy_quant: whether FP8 layers multiply in 16 bits. set: nearer to the original, "
                        "slower. remove: faster. as it is: what the file says, and what a legacy marker of two "
                        "elements says."
                    ),
                ),
                io.Combo.Input(
                    "input_scale",
                    options=list(INPUT_SCALES),
                    default=InputScale.KEEP.value,
                    tooltip=(
                        "What FP8 layers without an input scale get. keep: none, ComfyUI takes 1.0. 1.0: the same, "
                        "written out, for other loaders. weight scale: as some text encoder files have it; for those "
                        "only, others lose quality."
                    ),
                ),
                io.String.Input(
                    "hp_filter",
                    default="",
                    **rare(io.String.Input),
                    tooltip=(
                        "Regular expression: weights that must be in 16 bits, for example final_layer. If one is "
                        "quantized, the node stops and names it: a check on files of others. Empty: no check."
                    ),
                ),
                io.String.Input(
                    "scale_name",
                    default="",
                    optional=True,  # workflows of before it have none
                    **rare(io.String.Input),
                    tooltip=(
                        "Only for FP8 and INT8 files whose scales have a name that this pack cannot be sure of: how "
                        "these names end, for example scale for LAYER.scale. They are taken to multiply the codes. "
                        "Empty: such files are refused."
                    ),
                ),
                io.Boolean.Input(
                    "header",
                    default=True,
                    **rare(io.Boolean.Input),
                    tooltip=(
                        "For comfy_quant: also write the metadata into the file's header, for tools that read it "
                        "there. ComfyUI needs only the tensors."
                    ),
                ),
                io.Boolean.Input(
                    "preview",
                    default=False,
                    tooltip=(
                        "On: show what would change, write nothing, and let the nodes behind this one wait. Off: "
                        "write a new file, which takes disk space of the model's size."
                    ),
                ),
            ],
            outputs=[
                QuantizedType.Output("quantized", tooltip="In the new form: to load, to save, or for the next tool."),
                io.String.Output("changes", tooltip="What changed, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, quantized: QuantizedHandle, preview: bool, **values: Any) -> io.NodeOutput:
        settings = MigrateSettings(**values)
        outcome = run_tool(
            quantized,
            Tool(NAME, settings.describe(), preview),
            NodeProgress(cls.hidden.unique_id, "Migrating"),
            lambda src: plan(src, settings),
        )
        return io.NodeOutput(outcome.quantized, outcome.text, ui=ui.PreviewText(outcome.text))
