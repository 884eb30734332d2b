from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .shared.calibration_text import table
from .shared.capture import Capture
from .shared.handles import CATEGORY, CalibrationType, CaptureType
from .shared.progress import NodeProgress
from .shared.schema import schema


class CollectCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressCollect",
            display_name="Collect Calibration",
            category=CATEGORY,
            description="Takes what Capture Activations recorded, once the sampler is done, and shows what it holds.",
            has_intermediate_output=True,
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip=(
                        "From the sampler that ran the captured model: it makes this node wait. Of several samplers, "
                        "the last."
                    ),
                ),
                CaptureType.Input("capture", tooltip="From Capture Activations."),
            ],
            outputs=[
                CalibrationType.Output("calibration", tooltip="For Quantize Model, or Save Calibration."),
                io.String.Output("table", tooltip="Layers, rows and outlier channels as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, latent: Any, capture: Capture) -> io.NodeOutput:
        handle, rows = capture.collect(NodeProgress(cls.hidden.unique_id, "Collecting"))
        text = table(handle.path, rows, capture.plan)
        return io.NodeOutput(handle, text, ui=ui.PreviewText(text))
