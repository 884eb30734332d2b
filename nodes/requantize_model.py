from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .jobs.quantize_model import requantize
from .shared.handles import CATEGORY, QuantizedHandle, QuantizedType
from .shared.progress import NodeProgress
from .shared.recipe import RecipeInputs, read_settings, widgets
from .shared.report_text import requantized
from .shared.schema import schema


class RequantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressRequantize",
            display_name="Requantize",
            category=CATEGORY,
            description=(
                "Turns a quantized file into another format: each layer is decoded with its own scales and quantized "
                "again. What this adds to the error is shown. Take the 16-bit model where you have it: that loses "
                "less."
            ),
            has_intermediate_output=True,
            search_aliases=["convert", "fp8", "nf4", "bitsandbytes", "int8", "nvfp4"],
            inputs=[
                QuantizedType.Input("quantized", tooltip="From Open Quantized File, or any tool behind it."),
                *widgets(),
            ],
            outputs=[
                QuantizedType.Output("quantized", tooltip="To load in this graph, to save, or to inspect."),
                io.String.Output("report", tooltip="Sizes, the error that was added, and the worst layers, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, quantized: QuantizedHandle, **values: Any) -> io.NodeOutput:
        progress = NodeProgress(cls.hidden.unique_id, "Requantizing")
        handle, report = requantize(quantized, read_settings(RecipeInputs(**values)), progress)
        text = requantized(report)
        progress.say(text.partition("\n")[0])
        return io.NodeOutput(handle, text, ui=ui.PreviewText(text))
