"""The form that this pack writes, which is ComfyUI's own: what a stored layer is in it. Exact: no value changes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.header import TORCH_TO_CODE, OutputTensor
from ..checkpoint.metadata import Config, decode_config, same_json
from ..checkpoint.source import Source
from ..errors import InputFileError
from .form import Form
from .layers import StoredLayer, config_tensor_name

_STALE = ("params", "quant_map")  # nested settings, lifted to the root; a codebook that is a tensor now
_INPUT_SCALE = "input_scale"


def canonical_config(stored: StoredLayer, full_precision: bool | None = None, *, complete: bool = False) -> Config:
    """The comfy_quant object this pack would have written, with everything else that the layer's own one says.

    full_precision: sets or removes full_precision_matrix_mult; None leaves it. complete: add what other writers leave
    out, such as per_row, also to a layer that has a description.
    """
    config: Config = {key: value for key, value in stored.config.items() if key not in _STALE}
    config["format"] = stored.format.on_disk
    if complete or not stored.form.described:
        derived = stored.format.config(stored.shape, torch.bfloat16)
        if stored.form.described:
            derived.pop("dtype", None)  # of the weight it was made from, which nothing tells
        config |= {key: value for key, value in derived.items() if key not in config}
    if full_precision is not None and is_fp8(stored):
        config.pop("full_precision_matrix_mult", None)
        if full_precision:
            config["full_precision_matrix_mult"] = True
    return config


def is_fp8(stored: StoredLayer) -> bool:
    return stored.format.name.startswith("float8")


def is_canonical(src: Source, stored: StoredLayer) -> bool:
    """Whether the layer stands in the file just as this pack writes it, so that its bytes can be copied.

    Its entry in the header does not count: that is written anew with every file.
    """
    name = config_tensor_name(stored.layer)
    info = src.tensors.get(name)
    if stored.form is not Form.COMFY_QUANT or info is None or info.dtype != "U8" or len(info.shape) != 1:
        return False
    if any(part.steps != () for part in stored.parts.values()):
        return False
    try:
        return same_json(decode_config(src.read(name), stored.layer), dict(stored.config))
    except InputFileError:  # a loader cannot read it; the lenient reading that found the layer could
        return False


def canonical_outputs(stored: StoredLayer) -> tuple[OutputTensor, ...]:
    """The layer's tensors in this pack's form, without its comfy_quant tensor and pre_quant_scale."""
    layer, specs = stored.layer, stored.format.tensor_specs(stored.shape)
    outputs = [OutputTensor(f"{layer}.{spec.suffix}", TORCH_TO_CODE[spec.dtype], tuple(spec.shape)) for spec in specs]
    if _INPUT_SCALE in stored.parts and not any(spec.suffix == _INPUT_SCALE for spec in specs):
        outputs.append(OutputTensor(f"{layer}.{_INPUT_SCALE}", "F32", ()))
    return tuple(outputs)


def canonical_tensors(stored: StoredLayer, src: Source) -> dict[str, Tensor]:
    """{name: tensor} of `canonical_outputs`. Raises InputFileError, as StoredLayer.tensor does."""
    tensors = stored.tensors(src)
    scale = stored.input_scale(src)
    # A format that always has one gets 1.0, which changes nothing.
    tensors[_INPUT_SCALE] = torch.ones(()) if scale is None else scale
    return {output.name: tensors[output.name.removeprefix(f"{stored.layer}.")] for output in canonical_outputs(stored)}
