"""The Linear that the seam puts into ComfyUI's mixed-precision operations."""

from __future__ import annotations

from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..quant_core.checkpoint.metadata import CONFIG_SUFFIX, decode_config, encode_config
from ..quant_core.errors import InputFileError
from ..quant_core.formats import format_of_layer
from ..quant_core.formats.base import Format
from ..quant_core.stored.suffixes import QUANT_SUFFIXES
from .comfyui_formats import our_formats
from .comfyui_notes import count_rounded
from .comfyui_patches import weights_are_whole, whole_state
from .registry import tensor_of_layer

_CONFIG = CONFIG_SUFFIX.removeprefix(".")


def _peek(state_dict: dict[str, torch.Tensor], prefix: str) -> dict[str, Any] | None:
    """The layer's comfy_quant object, left where it is; None when the layer has none."""
    tensor = state_dict.get(prefix + _CONFIG)
    return None if tensor is None else decode_config(tensor, prefix.rstrip("."), lenient=True)[0]


def _whole_class(base: Any) -> Any:
    """A subclass that names its weight as one tensor while ComfyUI collects what is to be merged."""

    class Whole(base):
        def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any) -> Any:
            if weights_are_whole() and isinstance(getattr(self, "weight", None), QuantizedTensor):
                return whole_state(self, destination, prefix)
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)

    return Whole


def _patchable_class(base: Any) -> Any:
    """A subclass of ComfyUI's quantized Linear whose weight merges, hooks and LoRAs can change."""

    class Patchable(base):
        weight: Any
        _quantpress_format: Format | None = None

        def set_weight(
            self,
            weight: torch.Tensor,
            inplace_update: bool = False,
            seed: int | None = None,
            return_weight: bool = False,
            **kwargs: Any,
        ) -> Any:
            # Hooks ask for it in place, which ComfyUI's own refuses. A new Parameter serves them as well; but they
            # keep the float for the next step, and comfy-kitchen scales what it is given in place.
            weight = weight.clone() if inplace_update else weight
            if isinstance(self.weight, QuantizedTensor) and not return_weight:
                count_rounded(self.quant_format)
            try:
                return super().set_weight(weight, seed=seed, return_weight=return_weight, **kwargs)
            except NotImplementedError:  # comfy-kitchen takes AWQ weights from files alone
                if self._quantpress_format is None:
                    raise
                return _set_by_engine(self, self._quantpress_format, weight, return_weight)

    return Patchable


def linear_class(base: type) -> type:
    """A subclass of ComfyUI's quantized Linear that also loads and saves the formats of `our_formats()`."""

    patchable: Any = _patchable_class(_whole_class(base))

    class Linear(patchable):
        weight: Any
        _quantpress_config: dict[str, Any] | None = None

        def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
            config = _peek(state_dict, prefix)
            if config is not None and config["format"] in our_formats():
                _load_ours(self, config, state_dict, prefix, rest)
            else:
                super()._load_from_state_dict(state_dict, prefix, *rest)
            self._quantpress_config = config
            if config is not None and not isinstance(self.weight, QuantizedTensor):
                raise InputFileError(
                    f"{prefix}weight: the file calls it {config['format']}, and after loading it is "
                    f"{type(self.weight).__name__}. Update QuantPress and ComfyUI."
                )

        def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any) -> Any:
            destination = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
            written = destination.get(prefix + _CONFIG)
            if self._quantpress_config is not None and written is not None:
                # ComfyUI rebuilds the object from the fields it knows; those of ours must survive a save.
                config = {**self._quantpress_config, **decode_config(written, prefix.rstrip("."))}
                destination[prefix + _CONFIG] = encode_config(config)
            return destination

    Linear.__qualname__ = base.__qualname__
    return Linear


def _load_ours(
    module: Any,
    config: dict[str, Any],
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    rest: tuple[Any, ...],
) -> None:
    """Take the layer's tensors out of state_dict and give the module a QuantizedTensor.

    rest: what torch hands to _load_from_state_dict after the prefix.
    The tensors stay as they were read: a file mapped into memory is read-only, and ComfyUI's fast path from disk to
    the GPU recognises a weight by its storage.
    """
    layer, device, dtype = prefix.rstrip("."), module.factory_kwargs["device"], module.factory_kwargs["dtype"]
    if prefix + "pre_quant_scale" in state_dict:
        raise InputFileError(
            f"{layer}: {config['format']} with pre_quant_scale, which scales the inputs, is not run by this "
            "pack. Quantize the file again with it: the scale is then folded into the weight."
        )
    found = {suffix: state_dict.pop(prefix + suffix) for suffix in QUANT_SUFFIXES if prefix + suffix in state_dict}
    tensors = {suffix: tensor.to(device=device) for suffix, tensor in found.items() if suffix != _CONFIG}
    fmt = _checked_format(layer, config, tensors, tuple(module._orig_shape))
    module.weight = torch.nn.Parameter(
        tensor_of_layer(fmt, tensors, tuple(module._orig_shape), dtype), requires_grad=False
    )
    module._quantpress_format = fmt
    module.quant_format, module.layout_type = config["format"], fmt.runtime.layout
    module._full_precision_mm_config = bool(config.get("full_precision_matrix_mult", False))
    if module._full_precision_mm_config or module.quant_format in module._disabled_formats:
        module._full_precision_mm = True
    if "input_scale" in tensors:
        module.register_parameter("input_scale", torch.nn.Parameter(tensors["input_scale"], requires_grad=False))
    torch.nn.Module._load_from_state_dict(module, state_dict, prefix, *rest)
    _local_metadata, _strict, missing_keys, *_ = rest
    missing_keys[:] = [key for key in missing_keys if key not in (prefix + "weight", prefix + "input_scale")]


def _set_by_engine(module: Any, fmt: Format, weight: torch.Tensor, return_weight: bool) -> QuantizedTensor | None:
    """What set_weight does, rounded to nearest by the engine."""
    quantized = tensor_of_layer(fmt, fmt.quantize(weight), tuple(module._orig_shape), module.weight.dtype)
    if return_weight:
        return quantized
    module.weight = torch.nn.Parameter(quantized, requires_grad=False)
    return None


def _checked_format(
    layer: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: tuple[int, int]
) -> Any:
    """The layer's Format, after its tensors were found to be what it stores for a weight of this shape."""
    if "weight" not in tensors:
        raise InputFileError(
            f"{layer}: the file calls it {config['format']} and has no {layer}.weight. Download it again."
        )
    fmt = format_of_layer(layer, config, {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()})
    for spec in fmt.tensor_specs(shape):
        tensor = tensors.get(spec.suffix)
        if tensor is None and spec.optional:
            continue  # files of other tools leave them out, and every reader knows the default
        if tensor is None or tuple(tensor.shape) != spec.shape:
            what = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
            raise InputFileError(
                f"{layer}.{spec.suffix} {what}; {fmt.name} of a weight {list(shape)} needs {list(spec.shape)}. "
                "The file belongs to another model, or is damaged: quantize the source again."
            )
    return fmt


def refusing_class(base: type) -> type:
    """A subclass of another weight-carrying class that refuses our formats by name instead of reading packed bytes."""

    whole: Any = _whole_class(base)

    class Refusing(whole):
        def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
            config = _peek(state_dict, prefix)
            if config is not None and config["format"] in our_formats():
                raise InputFileError(
                    f"{prefix}weight is {config['format']}, and it belongs to a {base.__name__}, which ComfyUI "
                    "runs in its native formats only. Quantize the source again with this layer kept."
                )
            super()._load_from_state_dict(state_dict, prefix, *rest)

    Refusing.__name__, Refusing.__qualname__ = base.__name__, base.__qualname__
    return Refusing
