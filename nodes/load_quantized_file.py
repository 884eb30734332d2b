from __future__ import annotations

from comfy_api.latest import io

from .shared.folders import list_models, resolve_model, stamp
from .shared.handles import CATEGORY
from .shared.load_model import load_model
from .shared.schema import schema

_FOLDERS = ("diffusion_models", "checkpoints")


class LoadQuantizedFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressLoadFile",
            display_name="Load Quantized Diffusion Model",
            category=CATEGORY,
            description=(
                "Loads a quantized file even where the stock loader cannot: in a ComfyUI that is too old (the weights "
                "are then decoded to 16 bits), or beside ComfyUI-QuantOps."
            ),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_models(*_FOLDERS, shards=False),
                    tooltip=(
                        "A quantized file. Stock Load Diffusion Model does the same in a current ComfyUI; take this "
                        "node when that one fails, or when you share a workflow with people whose ComfyUI is older."
                    ),
                )
            ],
            outputs=[io.Model.Output("model", tooltip="For any node that takes a MODEL.")],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(load_model(resolve_model(file, *_FOLDERS)))

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return stamp(resolve_model(file, *_FOLDERS))
