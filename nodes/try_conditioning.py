from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .jobs.try_conditioning import KINDS, conditioning
from .shared.handles import CATEGORY
from .shared.schema import schema


class TestConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressTestConditioning",
            display_name="Test Conditioning",
            category=CATEGORY,
            description=(
                "Conditioning that fits the model, without a text encoder. For comparing a model with its quantized "
                "form: the picture means little, the difference between two pictures much."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="Its text input decides the size. Any diffusion model with a known text width."
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="noise",
                    tooltip=(
                        "'noise': exercises the text layers as a prompt would, so the comparison is strict. 'zeros': "
                        "no prompt at all, and a good negative. 'demo shapes': what the demo model was trained on."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip=(
                        "Of the noise; compare several before trusting one. Of 'demo shapes': 0 to 9, circle to ring "
                        "in warm and in cool colours."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning", tooltip="For KSampler. Use your text encoder for real pictures."
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, kind: str, seed: int) -> io.NodeOutput:
        return io.NodeOutput(conditioning(model, kind, seed))
