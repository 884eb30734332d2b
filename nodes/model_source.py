from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .jobs.model_source import describe, write_source
from .shared.handles import CATEGORY, SourceType
from .shared.progress import NodeProgress
from .shared.schema import schema


class ModelSource(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressModelSource",
            display_name="Model from Graph",
            category=CATEGORY,
            description="Takes a MODEL of the graph, with its LoRAs or merges, as the model to quantize.",
            has_intermediate_output=True,
            search_aliases=["bake lora", "quantize"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The model to quantize, after any LoRA or merge node. It is written to a temporary file "
                        "first, which takes disk space of its full size."
                    ),
                ),
                io.Boolean.Input(
                    "bake_loras",
                    default=True,
                    tooltip=(
                        "On: LoRAs are merged before quantizing, better than applying them to the quantized model. "
                        "Off: the model without them; apply LoRAs after loading, so that they can be changed."
                    ),
                ),
            ],
            outputs=[SourceType.Output("source", tooltip="For Quantize Model.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, bake_loras: bool) -> io.NodeOutput:
        source = write_source(model, bake_loras, NodeProgress(cls.hidden.unique_id, "Writing the model"))
        return io.NodeOutput(source, ui=ui.PreviewText(describe(source, model, bake_loras)))
