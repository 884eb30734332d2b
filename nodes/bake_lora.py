from __future__ import annotations

from comfy_api.latest import io, ui

from .jobs.bake_lora import bake_lora, list_loras
from .shared.folders import LORAS, resolve_model, stamp
from .shared.handles import CATEGORY, SourceHandle, SourceType
from .shared.progress import NodeProgress
from .shared.schema import schema


class BakeLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressBakeLora",
            display_name="Bake LoRA",
            category=CATEGORY,
            description=(
                "Merges a LoRA into a model before it is quantized, from file to file. That rounds once; a LoRA "
                "applied to quantized weights rounds twice, up to 3 dB worse. Chain the node for several LoRAs."
            ),
            has_intermediate_output=True,
            search_aliases=["merge lora", "fuse lora", "lycoris", "kohya"],
            inputs=[
                SourceType.Input(
                    "source", tooltip="A 16-bit model: from Load Model to Quantize, another Bake LoRA, or Dequantize."
                ),
                io.Combo.Input(
                    "lora_name",
                    options=list_loras(),
                    tooltip=(
                        "A file of the loras folder that ComfyUI can load for this model: LoRA, DoRA, LoHa, LoKr, "
                        "GLoRA, OFT or differences, under any of its names. Parts for text encoders are left out."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip=(
                        "How strongly the LoRA changes the weights. It is fixed once baked; 1 is what it was trained "
                        "for, negative takes it away."
                    ),
                ),
                io.Boolean.Input(
                    "skip_unmatched",
                    default=False,
                    tooltip=(
                        "Off: layers of the LoRA that the model has not are an error, as it is mostly a LoRA for "
                        "another model. On: they are left out and counted."
                    ),
                ),
            ],
            outputs=[
                SourceType.Output("source", tooltip="For Quantize Model, another Bake LoRA, or Save Model."),
                io.String.Output("report", tooltip="How many weights were changed, and what was left out, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, source: SourceHandle, lora_name: str, strength: float, skip_unmatched: bool) -> io.NodeOutput:
        progress = NodeProgress(cls.hidden.unique_id, "Baking the LoRA")
        handle, text = bake_lora(
            source, resolve_model(f"{LORAS}/{lora_name}", LORAS), strength, skip_unmatched, progress
        )
        return io.NodeOutput(handle, text, ui=ui.PreviewText(text))

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: object) -> str:
        return stamp(resolve_model(f"{LORAS}/{lora_name}", LORAS))
