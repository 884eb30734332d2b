from __future__ import annotations

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from .jobs.save_quantized import check_of, lora_target, warnings_of
from .shared.file_name import DEFAULT_PATTERN, expand, listed_name
from .shared.folders import LORAS, OUTPUT, SOURCE_FOLDERS, write_target
from .shared.handles import CATEGORY, QuantizedHandle, QuantizedType, origins_of, spool_of
from .shared.publish import publish
from .shared.schema import schema

_WARNED = 5


class SaveQuantized(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressSave",
            display_name="Save Quantized Model",
            category=CATEGORY,
            is_output_node=True,
            description="Saves the quantized model as a file. It is verified before it appears under its name.",
            inputs=[
                QuantizedType.Input(
                    "quantized", tooltip="From Quantize Model, Open Quantized File, or any tool behind them."
                ),
                io.Combo.Input(
                    "folder",
                    options=[*SOURCE_FOLDERS, OUTPUT],
                    default=SOURCE_FOLDERS[0],
                    tooltip=(
                        "A models folder: the file can be loaded at once. 'output': beside your pictures, for sharing."
                    ),
                ),
                io.String.Input(
                    "name",
                    default=DEFAULT_PATTERN,
                    tooltip=(
                        "File name; / makes a subfolder. Tokens: {model} {format} {group_size} {rounding} {seed} "
                        "{bits} {date} {time}. With {time} every run makes a new file."
                    ),
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip=(
                        "Off: an existing file is never touched, and the node stops with an error. On: it is "
                        "replaced, in one step."
                    ),
                ),
            ],
            outputs=[
                io.AnyType.Output(
                    "file_name",
                    tooltip=(
                        "The saved file as the loaders list it. Connect it to Load Diffusion Model to load it in the "
                        "same run."
                    ),
                ),
                io.AnyType.Output(
                    "lora_name",
                    tooltip=(
                        "With residual_lora in Quantize Model: its LoRA as the loaders list it. Connect it to Load "
                        "LoRA (Bypass, Model Only). Without: nothing comes out."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, quantized: QuantizedHandle, folder: str, name: str, overwrite: bool) -> io.NodeOutput:
        path = spool_of(quantized)
        expanded = expand(name, quantized)
        target = write_target(folder, expanded)
        lora = lora_target(quantized, expanded, overwrite)
        publish(path, target, overwrite, check_of(quantized), origins_of(quantized))
        listed = listed_name(expanded)
        text = f"saved {folder}/{listed}, {target.stat().st_size / 1e9:.3f} GB"
        text = "\n".join([text, *warnings_of(quantized)[:_WARNED]])
        if lora is not None and quantized.lora is not None:
            publish(quantized.lora, lora[1], overwrite)
            text += f"\nsaved {LORAS}/{lora[0]}: load it beside the model with Load LoRA (Bypass, Model Only)"
        return io.NodeOutput(listed, lora[0] if lora else ExecutionBlocker(None), ui=ui.PreviewText(text))
