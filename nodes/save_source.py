from __future__ import annotations

from comfy_api.latest import io, ui

from .jobs.save_source import one_file
from .shared.file_name import expand, listed_name
from .shared.folders import OUTPUT, SOURCE_FOLDERS, write_target
from .shared.handles import CATEGORY, SourceHandle, SourceType, origins_of
from .shared.progress import NodeProgress
from .shared.publish import keep_origins, publish
from .shared.schema import schema


class SaveSource(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressSaveSource",
            display_name="Save Model",
            category=CATEGORY,
            is_output_node=True,
            description=(
                "Saves a model that is not quantized as one file: a dequantized one, one with baked LoRAs, a "
                "diffusion model out of a checkpoint. Shards become one file. It is checked before it appears under "
                "its name."
            ),
            search_aliases=["join shards", "save"],
            inputs=[
                SourceType.Input(
                    "source", tooltip="From Dequantize, Bake LoRA, Extract Diffusion Model, or Load Model to Quantize."
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
                    default="{model}",
                    tooltip=(
                        "File name; / makes a subfolder. {model} is the source's name with what was done to it; "
                        "{date} and {time} are those of the run."
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
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, source: SourceHandle, folder: str, name: str, overwrite: bool) -> io.NodeOutput:
        expanded = expand(name, source)
        target = write_target(folder, expanded)
        keep_origins(target, origins_of(source))  # before shards are joined, which takes time
        path = one_file(source, NodeProgress(cls.hidden.unique_id, "Joining shards"))
        publish(path, target, overwrite, origins=origins_of(source))
        listed = listed_name(expanded)
        return io.NodeOutput(
            listed, ui=ui.PreviewText(f"saved {folder}/{listed}, {target.stat().st_size / 1e9:.3f} GB")
        )
