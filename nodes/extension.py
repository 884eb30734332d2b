"""The list of the nodes. Ids never change; the order is the one in which ComfyUI hears of them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from comfy_api.latest import ComfyExtension, io

from .shared.wording import names_its_inputs

# One file each, named here and nowhere else.
NODES = (
    "load_source",
    "model_source",
    "quantize_model",
    "load_quantized_in_graph",
    "save_quantized",
    "load_quantized_file",
    "inspect_quantization",
    "try_conditioning",
    "capture_activations",
    "collect_calibration",
    "save_calibration",
    "load_calibration",
    "open_quantized_file",
    "repair_file",
    "migrate_file",
    "edit_metadata",
    "calibrate_input_scales",
    "requantize_model",
    "dequantize_model",
    "convert_bitsandbytes",
    "bake_lora",
    "extract_model",
    "replace_model",
    "split_shards",
    "save_source",
)


class QuantPressExtension(ComfyExtension):
    async def on_load(self) -> None:
        from .shared.demo_models import offer
        from .shared.folders import add_calibrations_folder

        offer()
        add_calibrations_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [names_its_inputs(_node_in(import_module(f".{name}", __package__))) for name in NODES]


def _node_in(module: ModuleType) -> type[io.ComfyNode]:
    """The one node that a file defines."""
    (node,) = (
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, io.ComfyNode) and thing.__module__ == module.__name__
    )
    return node
