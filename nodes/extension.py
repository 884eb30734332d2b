"""The nodes, one file each. This module is the list of them; ids never change."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class QuantPressExtension(ComfyExtension):
    async def on_load(self) -> None:
        from .shared.demo_models import offer
        from .shared.folders import add_calibrations_folder

        offer()
        add_calibrations_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .bake_lora import BakeLora
        from .calibrate_input_scales import CalibrateInputScales
        from .capture_activations import CaptureActivations
        from .collect_calibration import CollectCalibration
        from .convert_bitsandbytes import ConvertBitsandbytes
        from .dequantize_model import DequantizeModel
        from .edit_metadata import EditMetadata
        from .extract_model import ExtractModel
        from .inspect_quantization import InspectQuantization
        from .load_calibration import LoadCalibration
        from .load_quantized_file import LoadQuantizedFile
        from .load_quantized_in_graph import LoadQuantizedInGraph
        from .load_source import LoadSource
        from .migrate_file import MigrateFile
        from .model_source import ModelSource
        from .open_quantized_file import OpenQuantizedFile
        from .quantize_model import QuantizeModel
        from .repair_file import Repair
        from .replace_model import ReplaceModel
        from .requantize_model import RequantizeModel
        from .save_calibration import SaveCalibration
        from .save_quantized import SaveQuantized
        from .save_source import SaveSource
        from .split_shards import SplitShards
        from .try_conditioning import TestConditioning

        return [
            LoadSource,
            ModelSource,
            QuantizeModel,
            LoadQuantizedInGraph,
            SaveQuantized,
            LoadQuantizedFile,
            InspectQuantization,
            TestConditioning,
            CaptureActivations,
            CollectCalibration,
            SaveCalibration,
            LoadCalibration,
            OpenQuantizedFile,
            Repair,
            MigrateFile,
            EditMetadata,
            CalibrateInputScales,
            RequantizeModel,
            DequantizeModel,
            ConvertBitsandbytes,
            BakeLora,
            ExtractModel,
            ReplaceModel,
            SplitShards,
            SaveSource,
        ]
