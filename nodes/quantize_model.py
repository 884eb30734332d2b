from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .jobs.quantize_model import quantize
from .shared.handles import CATEGORY, QuantizedType, SourceHandle, SourceType
from .shared.progress import NodeProgress
from .shared.recipe import RecipeInputs, read_settings, widgets
from .shared.report_text import summary
from .shared.schema import schema


class QuantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressQuantize",
            display_name="Quantize Model",
            category=CATEGORY,
            description=(
                "Quantizes a model layer by layer. It streams from file to file: memory holds one layer at a time, "
                "whatever the model's size. The result stays in ComfyUI's temporary folder until it is saved."
            ),
            has_intermediate_output=True,
            search_aliases=["fp8", "nvfp4", "mxfp8", "int8", "nf4", "convrot", "convert"],
            inputs=[
                SourceType.Input("source", tooltip="From Load Model to Quantize, or Model from Graph."),
                *widgets(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip=(
                        "With a calibration that holds calls: the unquantized model itself, without LoRAs, as Capture "
                        "Activations got it. Then every layer also makes up for the errors of the layers before it. "
                        "Closer to the original; takes the time of 16 to 128 calls of the model, and its memory."
                    ),
                ),
            ],
            outputs=[
                QuantizedType.Output("quantized", tooltip="To load in this graph, to save, or to inspect."),
                io.String.Output("report", tooltip="Sizes, what was kept and why, and the worst layers, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, source: SourceHandle, model: Any = None, **values: Any) -> io.NodeOutput:
        progress = NodeProgress(cls.hidden.unique_id, "Quantizing")
        handle, report = quantize(source, read_settings(RecipeInputs(**values)), progress, model=model)
        text = summary(report)
        progress.say(text.partition("\n")[0])
        return io.NodeOutput(handle, text, ui=ui.PreviewText(text))
