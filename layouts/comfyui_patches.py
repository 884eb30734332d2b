"""What ComfyUI's model patcher asks of a quantized layer: merging, and hooks that change weights while sampling.

A quantized layer saves its weight in pieces (codes, scales, comfy_quant). ComfyUI takes each key of a state dict for
the name of an attribute: merging asks the layer for `weight_scale`, which it has not, and "Create Hook Model as LoRA"
subtracts the codes. So while ComfyUI collects weights to be merged, a layer names its whole weight alone.
Hooks write into a weight in place and restore it afterwards: that copies the codes of a quantized one and leaves its
scales as they were. A new Parameter takes its place instead.

This holds for ComfyUI's own formats too. Read against ComfyUI 0.29.0 and 0.38.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_MARKER = "_quantpress_patches"
_COLLECTING = ("get_key_patches", "add_patches", "add_hook_patches")  # of ModelPatcher
_whole: ContextVar[bool] = ContextVar("quantpress_whole_weights", default=False)


def weights_are_whole() -> bool:
    """Whether state dicts are to name whole weights, as attributes, and not the pieces that a file holds."""
    return _whole.get()


@contextmanager
def whole_weights() -> Iterator[None]:
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def whole_state(module: Any, destination: dict[str, Any] | None, prefix: str) -> dict[str, Any]:
    """The state dict of a quantized layer, its weight as one tensor. The scale of its inputs is no weight to merge."""
    destination = {} if destination is None else destination
    for name in ("weight", "bias"):
        if getattr(module, name, None) is not None:
            destination[prefix + name] = getattr(module, name)
    return destination


def wrap_patcher() -> None:
    """Make merging and hooks work on quantized layers; a second call changes nothing."""
    import comfy.hooks
    import comfy.model_patcher
    import comfy.utils

    for name in _COLLECTING:
        _wrap(comfy.model_patcher.ModelPatcher, name, _collecting)
    _wrap(comfy.hooks, "get_patch_weights_from_model", _collecting)
    _wrap(comfy.utils, "copy_to_param", _replacing)


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    original = getattr(owner, name, None)
    if original is None or getattr(original, _MARKER, False):
        return
    wrapped = functools.wraps(original)(wrapper(original))
    setattr(wrapped, _MARKER, True)
    setattr(owner, name, wrapped)


def _collecting(original: Any) -> Any:
    def collect(*args: Any, **kwargs: Any) -> Any:
        with whole_weights():
            return original(*args, **kwargs)

    return collect


def _replacing(original: Any) -> Any:
    """For comfy.utils.copy_to_param(model, key, value)."""
    import comfy.utils
    from comfy_kitchen.tensor import QuantizedTensor

    def copy_to_param(obj: Any, attr: str, value: Any) -> Any:
        layer, _, name = attr.rpartition(".")
        module = comfy.utils.get_attr(obj, layer) if layer else obj
        if not isinstance(getattr(module, name, None), QuantizedTensor) or not hasattr(module, f"set_{name}"):
            return original(obj, attr, value)
        if isinstance(value, QuantizedTensor):
            return comfy.utils.set_attr_param(obj, attr, value)
        # A float, as hooks keep it for the next step: rounded with the same chance as the first time.
        return getattr(module, f"set_{name}")(value, seed=comfy.utils.string_to_seed(attr))

    return copy_to_param
