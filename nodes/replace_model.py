from __future__ import annotations

from comfy_api.latest import io, ui

from .jobs.replace_model import CHECKPOINTS, replace_model
from .shared.checkpoint_prefix import PREFIX_TOOLTIP
from .shared.folders import list_models, resolve_model, stamp
from .shared.handles import CATEGORY, QuantizedHandle, QuantizedType, SourceHandle, model_input
from .shared.progress import NodeProgress
from .shared.schema import rare, schema


class ReplaceModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressReplaceModel",
            display_name="Put Back into Checkpoint",
            category=CATEGORY,
            description=(
                "Puts a diffusion model in the place of the one in a full checkpoint, whose text encoders and VAE "
                "stay byte for byte. The checkpoint's own file is not changed: save the result under a name of its "
                "own."
            ),
            has_intermediate_output=True,
            search_aliases=["checkpoint", "merge", "insert", "unet"],
            inputs=[
                model_input(
                    "model", "The diffusion model alone: quantized, or a source such as Extract Diffusion Model gives."
                ),
                io.Combo.Input(
                    "checkpoint",
                    options=list_models(CHECKPOINTS),
                    tooltip=(
                        "The full checkpoint of the same model. The result is as large as it is, less what quantizing "
                        "saves."
                    ),
                ),
                io.String.Input(
                    "prefix", default="", placeholder="automatic", **rare(io.String.Input), tooltip=PREFIX_TOOLTIP
                ),
                io.Boolean.Input(
                    "allow_differences",
                    default=False,
                    tooltip=(
                        "Off: weights that only one of the two has are an error, as they are mostly two different "
                        "models. On: the checkpoint gets the model's weights as they are, and may no longer load."
                    ),
                ),
            ],
            outputs=[
                QuantizedType.Output("checkpoint", tooltip="For Save Quantized Model, with folder checkpoints."),
                io.String.Output("report", tooltip="What was replaced, and the size, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: QuantizedHandle | SourceHandle, checkpoint: str, prefix: str, allow_differences: bool
    ) -> io.NodeOutput:
        path = resolve_model(checkpoint, CHECKPOINTS)
        handle, text = replace_model(
            model, path, prefix, allow_differences, NodeProgress(cls.hidden.unique_id, "Putting together")
        )
        return io.NodeOutput(handle, text, ui=ui.PreviewText(text))

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, **_: object) -> str:
        return stamp(resolve_model(checkpoint, CHECKPOINTS))
