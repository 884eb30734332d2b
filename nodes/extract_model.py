from __future__ import annotations

from comfy_api.latest import io, ui

from .jobs.extract_model import extract_model
from .shared.checkpoint_prefix import PREFIX_TOOLTIP
from .shared.handles import CATEGORY, SourceHandle, SourceType
from .shared.progress import NodeProgress
from .shared.schema import rare, schema


class ExtractModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressExtractModel",
            display_name="Extract Diffusion Model",
            category=CATEGORY,
            description=(
                "Takes the diffusion model out of a full checkpoint, without its text encoders and VAE. Every tensor "
                "is copied byte for byte; quantized ones stay quantized."
            ),
            has_intermediate_output=True,
            search_aliases=["checkpoint", "unet", "split checkpoint", "prefix"],
            inputs=[
                SourceType.Input("source", tooltip="A full checkpoint, from Load Model to Quantize."),
                io.String.Input(
                    "prefix", default="", placeholder="automatic", **rare(io.String.Input), tooltip=PREFIX_TOOLTIP
                ),
            ],
            outputs=[
                SourceType.Output("source", tooltip="For Quantize Model, Bake LoRA, or Save Model."),
                io.String.Output("report", tooltip="What was found, and its size, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, source: SourceHandle, prefix: str) -> io.NodeOutput:
        handle, text = extract_model(source, prefix, NodeProgress(cls.hidden.unique_id, "Extracting"))
        return io.NodeOutput(handle, text, ui=ui.PreviewText(text))
