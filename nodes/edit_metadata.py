from __future__ import annotations

from comfy_api.latest import io, ui

from ..quant_core.errors import RequestError
from ..quant_core.tools.configs import HeaderMode
from ..quant_core.tools.edit import Edit, edit, parse_names, parse_pairs
from .shared.handles import CATEGORY, QuantizedHandle, QuantizedType
from .shared.progress import NodeProgress
from .shared.run_tool import Proposal, Tool, run_tool
from .shared.schema import rare, schema

NAME = "Edit Metadata"
_HEADER = {"update": HeaderMode.KEEP, "build": HeaderMode.BUILD, "remove": HeaderMode.DROP}


class EditMetadata(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressEditMetadata",
            display_name=NAME,
            category=CATEGORY,
            is_output_node=True,
            description=(
                "Changes what a file says of its quantized layers, in the comfy_quant tensors and in the header "
                "together. Weights and everything else stay byte for byte."
            ),
            search_aliases=["comfy_quant", "full_precision_matrix_mult", "header"],
            inputs=[
                QuantizedType.Input(
                    "quantized", tooltip="From Quantize Model, Open Quantized File, or any tool behind them."
                ),
                io.String.Input(
                    "add",
                    default="",
                    multiline=True,
                    placeholder="'full_precision_matrix_mult': true",
                    tooltip=(
                        "Keys to set: a JSON object, or pairs such as 'full_precision_matrix_mult': true. That key "
                        "makes FP8 layers multiply in 16 bits: nearer to the original, slower, and no less memory for "
                        "the weights."
                    ),
                ),
                io.String.Input(
                    "remove",
                    default="",
                    tooltip=(
                        "Keys to take out, with commas between. Without full_precision_matrix_mult FP8 layers "
                        "multiply in FP8 again: faster, a little less exact."
                    ),
                ),
                io.String.Input(
                    "layers",
                    default="",
                    tooltip=(
                        "Only layers whose name this regular expression finds, for example blocks\\.0\\. . Empty: all "
                        "of them."
                    ),
                ),
                io.Combo.Input(
                    "header",
                    options=list(_HEADER),
                    default="update",
                    tooltip=(
                        "The copy of the metadata in the file's header, which some tools read. update: keep it in "
                        "step where there is one. build: write it from the tensors, and tensors for layers that it "
                        "alone describes. remove: take it out; ComfyUI itself needs only the tensors."
                    ),
                ),
                io.Boolean.Input(
                    "force",
                    default=False,
                    **rare(io.Boolean.Input),
                    tooltip=(
                        "Off: a change after which the file would not load is refused. On: it is made, and saving "
                        "only warns. For other loaders than ComfyUI's."
                    ),
                ),
                io.Boolean.Input(
                    "preview",
                    default=False,
                    tooltip=(
                        "On: show what would change, write nothing, and let the nodes behind this one wait. Off: "
                        "write a new file, which takes disk space of the model's size."
                    ),
                ),
            ],
            outputs=[
                QuantizedType.Output(
                    "quantized", tooltip="With the new metadata: to save, to load, or for the next tool."
                ),
                io.String.Output("changes", tooltip="What changed, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, quantized: QuantizedHandle, add: str, remove: str, layers: str, header: str, force: bool, preview: bool
    ) -> io.NodeOutput:
        change = _change(add, remove, layers, header, force)
        settings = {"add": dict(change.add), "remove": list(change.remove), "layers": change.layers, "header": header}
        outcome = run_tool(
            quantized,
            Tool(NAME, settings, preview, force),
            NodeProgress(cls.hidden.unique_id, NAME),
            lambda src: Proposal(edit(src, change)),
        )
        return io.NodeOutput(outcome.quantized, outcome.text, ui=ui.PreviewText(outcome.text))


def _change(add: str, remove: str, layers: str, header: str, force: bool) -> Edit:
    change = Edit(
        parse_pairs(add) if add.strip() else {}, parse_names(remove), layers.strip() or None, _HEADER[header], force
    )
    if not change.add and not change.remove and change.header is HeaderMode.KEEP:
        raise RequestError(
            "There is nothing to do: fill in keys to add or to remove, or set header to build or remove."
        )
    return change
