from __future__ import annotations

from comfy_api.latest import io, ui

from .shared.calibration_text import summary
from .shared.file_name import listed_name
from .shared.folders import CALIBRATIONS, write_target
from .shared.handles import CATEGORY, CalibrationHandle, CalibrationType, spool_of
from .shared.publish import publish
from .shared.schema import schema


class SaveCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressSaveCalibration",
            display_name="Save Calibration",
            category=CATEGORY,
            is_output_node=True,
            description="Saves a calibration in models/calibrations, for Load Calibration and for the command line.",
            inputs=[
                CalibrationType.Input("calibration", tooltip="From Collect Calibration."),
                io.String.Input(
                    "name", default="calibration", tooltip="File name; / makes a subfolder of models/calibrations."
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
            outputs=[io.AnyType.Output("file_name", tooltip="The saved file as Load Calibration lists it.")],
        )

    @classmethod
    def execute(cls, calibration: CalibrationHandle, name: str, overwrite: bool) -> io.NodeOutput:
        target = write_target(CALIBRATIONS, name)
        publish(spool_of(calibration), target, overwrite, check=summary)
        listed = f"{CALIBRATIONS}/{listed_name(name)}"
        text = f"saved {listed}\n{summary(target)}"
        return io.NodeOutput(listed, ui=ui.PreviewText(text))
