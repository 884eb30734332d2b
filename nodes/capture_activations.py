from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io

from .jobs.capture_activations import ACCUMULATE, CALLS, START_OVER, CaptureInputs, start_capture
from .shared.handles import CATEGORY, CaptureType
from .shared.schema import schema


class CaptureActivations(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressCapture",
            display_name="Capture Activations",
            category=CATEGORY,
            description=(
                "Put it between the model and the sampler: while you draw, it records what flows into every layer. "
                "The pictures stay the same. Collect Calibration turns the record into a calibration."
            ),
            search_aliases=["calibrate", "calibration", "hessian", "gptq", "activations"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The 16-bit model, with the LoRAs that you always use. A compiled model is refused: it cannot "
                        "be watched."
                    ),
                ),
                io.Combo.Input(
                    "runs",
                    options=[ACCUMULATE, START_OVER],
                    default=ACCUMULATE,
                    tooltip=(
                        "accumulate: every run adds to the record, until an input of this node changes. start over: "
                        "each queued prompt begins with an empty record, and its memory is freed when it is collected."
                    ),
                ),
                io.Boolean.Input(
                    "hessians",
                    default=True,
                    tooltip=(
                        "On: also which inputs go together, which gptq needs; takes memory. Off: only sizes and "
                        "means, for input scales and bias correction."
                    ),
                ),
                io.Float.Input(
                    "device_gb",
                    default=0.0,
                    min=0.0,
                    max=512.0,
                    step=0.5,
                    tooltip=(
                        "Most memory for the record on the device that runs the model; ComfyUI is told to leave it "
                        "free. 0: a quarter of the GPU's. More: faster, as the widest layers' part need not move to "
                        "RAM. Less: more of the model stays there."
                    ),
                ),
                io.Float.Input(
                    "ram_gb",
                    default=16.0,
                    min=0.0,
                    max=4096.0,
                    step=1.0,
                    tooltip=(
                        "Most RAM for what finds no room on the device. Layers that find none keep a sketch, or their "
                        "diagonal only."
                    ),
                ),
                io.Int.Input(
                    "rows_per_step",
                    default=128,
                    min=1,
                    max=65536,
                    tooltip=(
                        "Most inputs that a layer gives per step, for the prompt and for the negative each; with "
                        "hessians off, a quarter of that. More: slower, and a little less chance in the result."
                    ),
                ),
                io.String.Input(
                    "layers",
                    default="",
                    tooltip=(
                        "Regular expression: only layers whose name matches are recorded. Empty: all. Fewer layers "
                        "take less memory."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip=(
                        "Which inputs are taken. The same seeds here and in the sampler give the same calibration."
                    ),
                ),
                # Optional, and last, so that workflows of before it run as they are.
                io.Int.Input(
                    "calls",
                    default=CALLS,
                    min=0,
                    max=4096,
                    optional=True,
                    tooltip=(
                        "How many of the model's calls are kept whole, for quantizing in order. They are chosen "
                        "evenly over all runs. More: a little better, but slower to quantize, and more RAM and disk "
                        "(2 GB at most); beyond 64 none is used. 0: none."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="For the sampler. Only what this output samples is recorded."),
                CaptureType.Output("capture", tooltip="For Collect Calibration."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(*start_capture(model, CaptureInputs(**values)))

    @classmethod
    def fingerprint_inputs(cls, runs: str, **_: Any) -> str:
        return str(time.time_ns()) if runs == START_OVER else ""
