from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io, ui

from ..quant_core.formats import all_formats
from ..quant_core.tools.diagnose import MODELOPT
from .jobs.repair_file import AUTOMATIC, NAME, ONLY_INPUTS, REPAIR, TIDY, RepairSettings, repaired
from .shared.handles import CATEGORY, QuantizedHandle, QuantizedType, SourceType
from .shared.progress import NodeProgress
from .shared.schema import rare, schema


class Repair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressRepair",
            display_name=NAME,
            category=CATEGORY,
            is_output_node=True,
            description=(
                "Finds what keeps a quantized file from loading, or makes it draw noise, and puts right whatever has "
                "one exact answer. The rest is named. No weight is requantized."
            ),
            search_aliases=["fix", "diagnose", "verify", "cleanup"],
            inputs=[
                QuantizedType.Input(
                    "quantized", tooltip="From Open Quantized File; a file that does not load is what this is for."
                ),
                io.Boolean.Input(
                    "only_diagnose",
                    default=False,
                    tooltip=(
                        "On: list what is wrong, write nothing, and let the nodes behind this one wait. Off: write "
                        "the repaired file, which takes disk space of the model's size; a file without faults goes on "
                        "as it is."
                    ),
                ),
                io.Combo.Input(
                    "assume",
                    options=[AUTOMATIC, *(fmt.name for fmt in all_formats()), MODELOPT],
                    default=AUTOMATIC,
                    tooltip=(
                        "What layers without metadata are, where their tensors fit several formats: a wrong choice "
                        "draws noise. automatic: such layers are only named. Connecting the original finds it out."
                    ),
                ),
                io.Boolean.Input(
                    "unswizzled",
                    default=False,
                    **rare(io.Boolean.Input),
                    tooltip=(
                        "On: the block scales of NVFP4 and MXFP8 lie in row order and are reordered. Only where the "
                        "pictures are noise although everything loads: on a sound file it makes noise."
                    ),
                ),
                io.Combo.Input(
                    "mode",
                    options=[REPAIR, TIDY, ONLY_INPUTS],
                    default=REPAIR,
                    tooltip=(
                        "repair: everything but legacy fp8_scaled, which Migrate Legacy File converts. tidy legacy: "
                        "keep that form, without scales that serve nothing. legacy scale_input: only add scale_input "
                        "1.0, which some loaders want."
                    ),
                ),
                io.Combo.Input(
                    "marker",
                    options=["0", "2"],
                    default="0",
                    **rare(io.Combo.Input),
                    tooltip=(
                        "tidy legacy: elements of the scaled_fp8 marker. 0: FP8 layers multiply in FP8, fast. 2: "
                        "ComfyUI multiplies in 16 bits: slower, a little nearer to the original."
                    ),
                ),
                io.Boolean.Input(
                    "add_scale_input",
                    default=False,
                    **rare(io.Boolean.Input),
                    tooltip=(
                        "tidy legacy: write scale_input 1.0 where a layer has none. ComfyUI takes 1.0 anyway: for "
                        "other loaders."
                    ),
                ),
                io.Boolean.Input(
                    "keep_shapes",
                    default=False,
                    **rare(io.Boolean.Input),
                    tooltip=(
                        "tidy legacy: leave scales of one element in the shape they have, instead of making plain "
                        "numbers of them. The values are the same; for loaders that look at the shape."
                    ),
                ),
                SourceType.Input(
                    "original",
                    optional=True,
                    tooltip=(
                        "The 16-bit model that the file was made from, from Load Model to Quantize: a layer is "
                        "decoded each way and compared, which tells what assume and unswizzled must be."
                    ),
                ),
            ],
            outputs=[
                QuantizedType.Output("quantized", tooltip="Repaired: to load, to save, or for the next tool."),
                io.String.Output("findings", tooltip="What was found and what changed, as text."),
                io.String.Output("json", tooltip="Every finding with its code and layer, for scripts."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, quantized: QuantizedHandle, only_diagnose: bool, **values: Any) -> io.NodeOutput:
        progress = NodeProgress(cls.hidden.unique_id, NAME)
        outcome = repaired(quantized, RepairSettings(**values), only_diagnose, progress)
        return io.NodeOutput(
            outcome.quantized, outcome.text, json.dumps(outcome.data, indent=1), ui=ui.PreviewText(outcome.text)
        )
