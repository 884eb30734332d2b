from __future__ import annotations

from comfy_api.latest import io

from .shared.handles import CATEGORY, QuantizedHandle, QuantizedType, spool_of
from .shared.load_model import load_model
from .shared.schema import schema


class LoadQuantizedInGraph(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressLoadQuantized",
            display_name="Load Quantized Model (in graph)",
            category=CATEGORY,
            description="Loads the quantized model as a MODEL without saving it first, exactly as its file would "
            "load.",
            inputs=[
                QuantizedType.Input(
                    "quantized",
                    tooltip=(
                        "From Quantize Model, Open Quantized File, or any tool behind them. Try settings this way, "
                        "and save once you like the pictures."
                    ),
                )
            ],
            outputs=[
                io.Model.Output("model", tooltip="For any node that takes a MODEL: samplers, LoRA loaders, ModelSave.")
            ],
        )

    @classmethod
    def execute(cls, quantized: QuantizedHandle) -> io.NodeOutput:
        return io.NodeOutput(load_model(spool_of(quantized), keep=quantized))
