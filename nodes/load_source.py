from __future__ import annotations

from comfy_api.latest import io, ui

from .jobs.load_source import describe_source
from .shared.detection import detect
from .shared.folders import SOURCE_FOLDERS, list_models, resolve_model, stamp
from .shared.handles import CATEGORY, SourceHandle, SourceType, label_of
from .shared.schema import schema


class LoadSource(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressLoadSource",
            display_name="Load Model to Quantize",
            category=CATEGORY,
            description="Names a model file to be quantized. Only its header is read, so this takes no time and no "
            "memory.",
            has_intermediate_output=True,
            search_aliases=["quantize", "convert", "fp8", "nvfp4", "int8"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_models(*SOURCE_FOLDERS),
                    tooltip=(
                        "A .safetensors file, or the index of a model in shards, from diffusion_models, checkpoints "
                        "or text_encoders. Take the 16-bit model where you can: quantizing a quantized file again "
                        "loses more."
                    ),
                )
            ],
            outputs=[
                SourceType.Output("source", tooltip="For Quantize Model."),
                io.String.Output("info", tooltip="Architecture, dtypes and size as text."),
            ],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = resolve_model(file, *SOURCE_FOLDERS)
        text = describe_source(path, detect(path))
        return io.NodeOutput(SourceHandle(path, label_of(path)), text, ui=ui.PreviewText(text))

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return stamp(resolve_model(file, *SOURCE_FOLDERS))
