from __future__ import annotations

from comfy_api.latest import io, ui

from .jobs.dequantize_model import dequantized
from .shared.handles import CATEGORY, QuantizedHandle, QuantizedType, SourceType
from .shared.progress import NodeProgress
from .shared.schema import schema

DTYPES = ("bf16", "fp16", "fp32")


class DequantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressDequantize",
            display_name="Dequantize",
            category=CATEGORY,
            description="Decodes every quantized layer with its own scales into a plain 16- or 32-bit model, for "
            "tools that read nothing else. What rounding lost stays lost.",
            has_intermediate_output=True,
            search_aliases=["decode", "bf16", "fp16", "unquantize"],
            inputs=[
                QuantizedType.Input("quantized", tooltip="From Open Quantized File, or any tool behind it."),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default=DTYPES[0],
                    tooltip=(
                        "Of the decoded weights. bf16: right for nearly all models. fp16: finer, but weights above "
                        "65504 are refused. fp32: decoded exactly, twice the size. All other tensors stay as they are."
                    ),
                ),
            ],
            outputs=[
                SourceType.Output("source", tooltip="For Save Model, Quantize Model, Bake LoRA and the like."),
                io.String.Output("report", tooltip="What was decoded, and the sizes, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, quantized: QuantizedHandle, dtype: str) -> io.NodeOutput:
        handle, text = dequantized(quantized, dtype, NodeProgress(cls.hidden.unique_id, "Decoding"))
        return io.NodeOutput(handle, text, ui=ui.PreviewText(text))
