from __future__ import annotations

from comfy_api.latest import io, ui

from .jobs.open_quantized_file import open_quantized
from .shared.folders import SOURCE_FOLDERS, list_models, resolve_model, stamp
from .shared.handles import CATEGORY, QuantizedType
from .shared.progress import NodeProgress
from .shared.schema import schema


class OpenQuantizedFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressOpenFile",
            display_name="Open Quantized File",
            category=CATEGORY,
            description=(
                "Names a file that is quantized already, for the tools: repair it, migrate it, edit its metadata, "
                "calibrate its input scales. Nothing is loaded, and the file itself is never changed."
            ),
            has_intermediate_output=True,
            search_aliases=["repair", "migrate", "metadata", "fp8_scaled", "comfy_quant"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_models(*SOURCE_FOLDERS),
                    tooltip=(
                        "A quantized .safetensors file, or the index of one in shards, from diffusion_models, "
                        "checkpoints or text_encoders. Opening reads the header and the scales: quick for any size. "
                        "Shards are joined first, which takes disk space of the model's size."
                    ),
                )
            ],
            outputs=[
                QuantizedType.Output(
                    "quantized", tooltip="For the tools, to load in this graph, to save, or to inspect."
                ),
                io.String.Output("info", tooltip="Formats, size and problems as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = resolve_model(file, *SOURCE_FOLDERS)
        handle, text = open_quantized(path, NodeProgress(cls.hidden.unique_id, "Joining shards"))
        return io.NodeOutput(handle, text, ui=ui.PreviewText(text))

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return stamp(resolve_model(file, *SOURCE_FOLDERS))
