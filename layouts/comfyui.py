"""The seam to ComfyUI: one wrap of `comfy.ops.mixed_precision_ops`, so that the stock loaders take our formats.

Every quantized model in ComfyUI is built from the class that `mixed_precision_ops` returns: diffusion models through
`pick_operations`, text encoders directly. The wrap returns a subclass whose Linear loads and saves OUR formats and
hands everything else, native formats included, to the original. Formats that ComfyUI knows itself never pass through
here. Besides, merging and hooks learn what a quantized weight is (comfyui_patches.py), and what costs quality is said
in the log (comfyui_notes.py).

A layer that a file calls quantized either holds a QuantizedTensor after loading, or loading fails with its name: a
packed weight that reaches a matmul as a plain uint8 tensor is the "mat1 and mat2 must have the same dtype" error.

Read against ComfyUI 0.29.0 and 0.38.1 (comfy/ops.py @0271a469), where function, class and methods have the same shape.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

from .comfyui_audit import wrap_load_model_weights
from .comfyui_formats import MARKER, register_formats
from .comfyui_notes import wrap_load
from .comfyui_patches import wrap_patcher

log = logging.getLogger(__name__)

NEEDS = "0.29.0"
_UPDATE = f"Update ComfyUI to {NEEDS} or newer. The nodes that work from file to file do not need it."


@dataclass(frozen=True, slots=True)
class SeamStatus:
    """installed: the stock loaders take our formats. reason: why not, one sentence. formats: the names on disk."""

    installed: bool
    reason: str = ""
    formats: tuple[str, ...] = ()


_status = SeamStatus(False, "register() was not called yet.")


def status() -> SeamStatus:
    """What register() found."""
    return _status


def register() -> SeamStatus:
    """Register the layouts and wrap `mixed_precision_ops`; a second call changes nothing. Logs one line; never raises
    for a ComfyUI that is too old or lacks comfy-kitchen."""
    global _status
    _status = _install()
    if _status.installed:
        log.info("QuantPress: the loaders of this ComfyUI now take %s.", ", ".join(_status.formats))
    else:
        log.warning("QuantPress: models in its own formats cannot be loaded here: %s", _status.reason)
    if quantops_present():
        log.warning(
            "QuantPress: ComfyUI-QuantOps is installed too and takes over models in formats that it knows by name; "
            "use 'Load Quantized Diffusion Model' for QuantPress files, or disable one of the packs."
        )
    return _status


def quantops_present() -> bool:
    """Whether ComfyUI-QuantOps has patched the loaders of `comfy.sd` (it may do so after us: ask when it matters)."""
    import comfy.sd

    return bool(getattr(comfy.sd, "_quantops_auto_patch_installed", False))


def _install() -> SeamStatus:
    problem = _missing_support()
    if problem:
        return SeamStatus(False, problem)
    import comfy.ops

    try:
        from .registry import register_layouts
    except ImportError as err:
        return SeamStatus(
            False, f"comfy-kitchen is too old for the layouts ({err}). Install ComfyUI's requirements.txt."
        )
    register_layouts()
    formats = register_formats()
    if not getattr(comfy.ops.mixed_precision_ops, MARKER, False):
        comfy.ops.mixed_precision_ops = _wrap(comfy.ops.mixed_precision_ops)
    wrap_load_model_weights()
    wrap_patcher()
    wrap_load()
    return SeamStatus(True, "", formats)


def _missing_support() -> str:
    """Feature detection: what this ComfyUI lacks, as a sentence with the way out; "" when nothing."""
    try:
        import comfy_kitchen.tensor as kitchen
    except ImportError as err:
        return f"comfy-kitchen cannot be imported ({err}). Install ComfyUI's requirements.txt."
    import comfy.ops

    try:
        import comfy.quant_ops as quant_ops
    except ImportError as err:
        return f"comfy.quant_ops cannot be imported ({err}). {_UPDATE}"
    algorithms = getattr(quant_ops, "QUANT_ALGOS", {})
    if getattr(quant_ops, "QuantizedTensor", None) is not kitchen.QuantizedTensor:
        # ComfyUI puts an empty class there when comfy-kitchen lacks a layout that it imports.
        return "ComfyUI does not use the installed comfy-kitchen. Install ComfyUI's requirements.txt again."
    if "quantize_input" not in algorithms.get("int8_tensorwise", {}):
        return f"it is older than {NEEDS}. {_UPDATE}"
    if not hasattr(comfy.ops, "mixed_precision_ops"):
        return f"comfy.ops.mixed_precision_ops is gone. Update this pack. {_UPDATE}"
    return _linear_problem(comfy.ops.mixed_precision_ops)


def _linear_problem(mixed_precision_ops: Any) -> str:
    """Build one layer on the meta device and look for what the seam uses."""
    import torch

    linear = getattr(mixed_precision_ops(), "Linear", None)
    layer: Any = linear(2, 2, device="meta") if linear is not None else None
    wanted = ("factory_kwargs", "_orig_shape", "_full_precision_mm", "_disabled_formats", "forward", "set_weight")
    missing = [name for name in wanted if not hasattr(layer, name)]
    if missing or not isinstance(layer.factory_kwargs.get("dtype"), torch.dtype):
        return f"its quantized Linear has changed ({', '.join(missing) or 'factory_kwargs'}). Update this pack."
    return ""


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def mixed_precision_ops(*args: Any, **kwargs: Any) -> type:
        # Here, because the module needs comfy-kitchen, and this one must load and say so where it is not there.
        from .comfyui_linear import linear_class, refusing_class

        base = original(*args, **kwargs)
        members: dict[str, Any] = {"Linear": linear_class(base.Linear)}
        for name in ("Embedding", "MoEExperts"):
            if hasattr(base, name):
                members[name] = refusing_class(getattr(base, name))
        # A subclass, so that issubclass(ops, manual_cast) and the like still hold.
        return type(base.__name__, (base,), members)

    setattr(mixed_precision_ops, MARKER, True)
    return mixed_precision_ops
