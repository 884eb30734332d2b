from __future__ import annotations

from comfy_api.latest import io, ui

from .jobs.split_shards import write_shards
from .shared.file_name import expand
from .shared.folders import OUTPUT, SOURCE_FOLDERS, write_target
from .shared.handles import CATEGORY, QuantizedHandle, SourceHandle, model_input
from .shared.progress import NodeProgress
from .shared.schema import schema


class SplitShards(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressSplitShards",
            display_name="Save as Shards",
            category=CATEGORY,
            is_output_node=True,
            description=(
                "Saves a model as several files and an index, as large models are shared. Every layer stays in one "
                "shard. Load Model to Quantize and Open Quantized File read shards by their index; ComfyUI's own "
                "loaders do not."
            ),
            search_aliases=["split", "shard", "index", "huggingface"],
            inputs=[
                model_input("model", "A quantized model or a source."),
                io.Combo.Input(
                    "folder",
                    options=[OUTPUT, *SOURCE_FOLDERS],
                    default=OUTPUT,
                    tooltip=(
                        "'output': beside your pictures, for sharing. A models folder: the index is then listed by "
                        "Load Model to Quantize."
                    ),
                ),
                io.String.Input(
                    "name",
                    default="{model}/model",
                    tooltip=(
                        "Name of the shards without number; / makes a subfolder. Tokens as in Save Quantized Model. "
                        "Existing files are never touched: with {time} every run makes new ones."
                    ),
                ),
                io.Float.Input(
                    "max_gb",
                    default=5.0,
                    min=0.001,
                    max=1000.0,
                    step=0.1,
                    round=0.001,
                    tooltip=(
                        "Size of a shard at most, in GB of 10^9 bytes. Smaller ones make more files and are easier to "
                        "upload again; speed and quality do not change."
                    ),
                ),
            ],
            outputs=[io.String.Output("index", tooltip="The index that was written, with its folder.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: QuantizedHandle | SourceHandle, folder: str, name: str, max_gb: float) -> io.NodeOutput:
        target = write_target(folder, expand(name, model))
        index, text = write_shards(model, target, max_gb, NodeProgress(cls.hidden.unique_id, "Splitting"))
        return io.NodeOutput(str(index), ui=ui.PreviewText(f"saved {index.name} in {folder}: {text}"))
