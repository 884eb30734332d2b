from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..quant_core.errors import RequestError
from .jobs.inspect_quantization import inspect, table
from .shared.folders import SOURCE_FOLDERS, list_models, resolve_model, stamp
from .shared.handles import CATEGORY, QuantizedHandle, QuantizedType, spool_of
from .shared.schema import schema

CONNECTED = "(the connected model)"


class InspectQuantization(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressInspect",
            display_name="Inspect Quantization",
            category=CATEGORY,
            is_output_node=True,
            description="Shows what is inside a file: layer groups, formats, sizes, and what a loader would stumble "
            "over.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[CONNECTED, *list_models(*SOURCE_FOLDERS)],
                    default=CONNECTED,
                    tooltip=("A file to look into. Header and scales are read, not the weights: quick for any size."),
                ),
                QuantizedType.Input(
                    "quantized",
                    optional=True,
                    tooltip=(
                        "A model from Quantize Model, Open Quantized File or a tool, before it is saved. Used when no "
                        "file is chosen."
                    ),
                ),
            ],
            outputs=[
                io.String.Output("table", tooltip="The table as text."),
                io.String.Output("json", tooltip="Everything, for scripts."),
            ],
        )

    @classmethod
    def execute(cls, file: str, quantized: QuantizedHandle | None = None) -> io.NodeOutput:
        if file != CONNECTED:
            path = resolve_model(file, *SOURCE_FOLDERS)
        elif quantized is None:
            raise RequestError("Choose a file, or connect a quantized model.")
        else:
            path = spool_of(quantized)
        found = inspect(path)
        text = table(found)
        return io.NodeOutput(text, json.dumps(found, indent=1), ui=ui.PreviewText(text))

    @classmethod
    def fingerprint_inputs(cls, file: str, quantized: QuantizedHandle | None = None) -> str:
        return "" if file == CONNECTED else stamp(resolve_model(file, *SOURCE_FOLDERS))
