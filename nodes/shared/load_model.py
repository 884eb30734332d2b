"""A quantized file -> a MODEL, through the seam where it can be installed, decoded where it cannot."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ...layouts import comfyui as seam
from ...layouts.comfyui_audit import audit, our_layers
from ...quant_core.cancel import cancel_scope, poll
from ...quant_core.checkpoint.metadata import HEADER_KEY
from ...quant_core.checkpoint.source import open_source
from ...quant_core.errors import InputFileError
from ...quant_core.stored.layers import stored_layers
from .progress import NodeProgress
from .schema import known

log = logging.getLogger(__name__)


def load_model(path: Path, keep: Any = None) -> Any:
    """The ModelPatcher for a quantized (or plain) file. keep: an object that lives as long as the model does.

    Raises InputFileError: no model that ComfyUI knows, or a layer that did not arrive quantized.
    """
    import comfy.sd

    if not seam.status().installed:
        model = _load_decoded(path)
    elif seam.quantops_present():
        model = _load_with_own_operations(path)
    else:
        model = comfy.sd.load_diffusion_model(str(path))
    if keep is not None:
        model.set_attachments("quantpress", keep)
    return model


def _load_with_own_operations(path: Path) -> Any:
    """With the operations given, so that a pack that patches `comfy.sd` leaves the file alone."""
    import comfy.model_detection
    import comfy.model_management
    import comfy.ops
    import comfy.sd
    import comfy.utils

    state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    state, metadata = comfy.utils.convert_old_quants(state, "", metadata=metadata)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    state = comfy.utils.state_dict_prefix_replace(state, {prefix: ""}, filter_keys=True) or state
    config = comfy.model_detection.model_config_from_unet(state, "", metadata=metadata)
    if config is None:
        raise _unknown(path)
    device = comfy.model_management.get_torch_device()
    compute = comfy.model_management.unet_manual_cast(None, device, config.supported_inference_dtypes)
    layers = our_layers(state)
    operations = comfy.ops.mixed_precision_ops(config.quant_config or {}, compute)
    model = comfy.sd.load_diffusion_model_state_dict(state, {"custom_operations": operations}, metadata=metadata)
    audit(model.model.diffusion_model, layers, path.name)
    return model


def _load_decoded(path: Path) -> Any:
    """Every quantized layer decoded to bf16 while it is read: the same picture, without the savings in memory."""
    import comfy.sd

    log.warning("QuantPress: %s is decoded to bf16 while it loads, since %s", path.name, seam.status().reason)
    with open_source(path) as source, cancel_scope(NodeProgress.cancelled):
        layers = stored_layers(source)
        replaced = {name for layer in layers.values() for name in layer.names.values()}
        state = {}
        for name in source.tensors:
            poll()
            if name not in replaced:
                state[name] = source.read(name)
        for layer in layers.values():
            poll()
            state[f"{layer.layer}.weight"] = layer.decode(source).to(torch.bfloat16)
        metadata = {key: value for key, value in source.metadata.items() if key != HEADER_KEY}
    load = comfy.sd.load_diffusion_model_state_dict
    model = load(state, **known(load, metadata=metadata))
    if model is None:
        raise _unknown(path)
    return model


def _unknown(path: Path) -> InputFileError:
    return InputFileError(
        f"{path.name}: ComfyUI does not recognise the model in it. Choose a diffusion model; text encoders "
        "and VAEs have loaders of their own."
    )
