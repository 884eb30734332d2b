from __future__ import annotations

from comfy_api.latest import io, ui

from .shared.calibration_text import summary
from .shared.folders import CALIBRATIONS, list_models, resolve_model, stamp
from .shared.handles import CATEGORY, CalibrationHandle, CalibrationType, label_of
from .shared.schema import schema


class LoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="QuantPressLoadCalibration",
            display_name="Load Calibration",
            category=CATEGORY,
            description="Names a saved calibration from models/calibrations. Only its header is read here.",
            has_intermediate_output=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_models(CALIBRATIONS),
                    tooltip=(
                        "A file of Save Calibration, or of `quantpress calibration merge`. It must belong to the "
                        "model that you quantize."
                    ),
                )
            ],
            outputs=[
                CalibrationType.Output("calibration", tooltip="For Quantize Model."),
                io.String.Output("info", tooltip="Runs, layers and rows as text."),
            ],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = resolve_model(file, CALIBRATIONS)
        text = summary(path)
        return io.NodeOutput(CalibrationHandle(path, label_of(path)), text, ui=ui.PreviewText(text))

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return stamp(resolve_model(file, CALIBRATIONS))
