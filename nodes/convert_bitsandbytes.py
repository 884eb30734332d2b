from __future__ import annotations

from comfy_api.latest import io, ui

from .jobs.convert_bitsandbytes import EXPORT, IMPORT, convert_structure
from .shared.handles import CATEGORY, QuantizedHandle, QuantizedType
from .shared.progress import NodeProgress
from .shared.schema import schema


class ConvertBitsandbytes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressBitsandbytes",
            display_name="Convert bitsandbytes",
            category=CATEGORY,
            description=(
                "Between bitsandbytes' way to store NF4 and FP4 layers and ComfyUI's. The codes stay as they are: "
                "nothing is rounded again, except for nested scales."
            ),
            has_intermediate_output=True,
            search_aliases=["nf4", "fp4", "bnb", "quant_state", "absmax"],
            inputs=[
                QuantizedType.Input(
                    "quantized", tooltip="From Open Quantized File, Quantize Model, or any tool behind them."
                ),
                io.Combo.Input(
                    "direction",
                    options=[IMPORT, EXPORT],
                    default=IMPORT,
                    tooltip=(
                        "import: a file that bitsandbytes or diffusers wrote, to be loaded by ComfyUI with "
                        "QuantPress. export: NF4, FP4 and AF4 layers as bitsandbytes itself writes them, for other "
                        "programs; ComfyUI does not load that file."
                    ),
                ),
                io.Boolean.Input(
                    "nested",
                    default=False,
                    tooltip=(
                        "For export: the scales are quantized to 8 bits as well (double quantization). Saves about "
                        "0.4 bits per weight, and adds a little error. Import reads both kinds."
                    ),
                ),
            ],
            outputs=[
                QuantizedType.Output(
                    "quantized", tooltip="To save, to inspect, or after an import to load in this graph."
                ),
                io.String.Output("report", tooltip="What changed, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, quantized: QuantizedHandle, direction: str, nested: bool) -> io.NodeOutput:
        outcome = convert_structure(quantized, direction, nested, NodeProgress(cls.hidden.unique_id, "Converting"))
        return io.NodeOutput(outcome.quantized, outcome.text, ui=ui.PreviewText(outcome.text))
