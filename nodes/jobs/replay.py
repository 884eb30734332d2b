"""Replaying recorded model calls on a loaded MODEL, so that its layers see again what they saw while sampling.

Several threads may replay, one running at a time; a thread may wait inside a linear layer's forward pre-hook while
another runs. What ComfyUI keeps for the whole process must then hold nothing of one call across such a wait: see
`loaded`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from comfy import model_management
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP, merge_nested_dicts
from torch import nn

from ...quant_core.calibration.calls import RecordedCall
from ...quant_core.calibration.capture.linear_modules import linear_modules, refuse_compiled
from ...quant_core.errors import RequestError, some_of
from ..shared.model_state import COMPILE_KEY, KEY, compiled, is_plain_float, model_compiler_off

_SKIPPING = "easycache"  # ComfyUI's key of the wrapper that leaves out calls that resemble the last one


def replayable(model: Any) -> None:
    """RequestError when replays on this ModelPatcher would show other inputs than those of its file's own layers."""
    root = model.get_model_object("diffusion_model")
    if model.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY):
        raise compiled()
    refuse_compiled(root)
    what = "Quantizing in order runs the model, and "
    if model.patches:
        raise RequestError(
            f"{what}{len(model.patches)} of its weights are patched (by a LoRA, say): the layers would be fitted to "
            "undo the patch. Connect the model without it, or bake the LoRA into the source and load that."
        )
    if model.injections or model.hook_patches or model.forced_hooks or model.weight_wrapper_patches:
        kinds = [*model.injections] or ["hooks on its weights"]
        raise RequestError(
            f"{what}something changes its layers while it runs ({some_of(kinds)}), so they would be fitted to "
            "undo that. Connect the model as its loader gives it."
        )
    if model.get_wrappers(WrappersMP.DIFFUSION_MODEL, _SKIPPING):
        raise RequestError(f"{what}EasyCache would leave out calls. Connect the model without it.")
    quantized = [name for name, module in linear_modules(root).items() if not is_plain_float(module.weight)]
    if quantized:
        raise RequestError(
            f"{what}{len(quantized)} of its layers are not 16-bit or 32-bit floats ({some_of(quantized, shown=3)}). "
            "Load the unquantized model, with weight_dtype default."
        )


def call_bytes(model: Any, shapes: Mapping[str, Sequence[int]]) -> int:
    """What ComfyUI reckons that a call takes on the device, beside the weights: see `loaded`.

    shapes: of its tensors, by path.
    """
    conditions = {path: [list(shape)] for path, shape in shapes.items() if "." not in path}
    return int(model.model.memory_required(list(shapes["x"]), cond_shapes=conditions))


@contextmanager
def loaded(model: Any, extra_bytes: int) -> Iterator[tuple[nn.Module, torch.device]]:
    """Load a ModelPatcher as a sampler would; yields (its diffusion model, the device that calls run on).

    extra_bytes: to be left free on that device, for a call (call_bytes) times the number that run at once, and for
    whatever the caller keeps there. Where the rest is too small for the weights, ComfyUI moves each layer's to the
    device when it is called.
    """
    device = model.load_device
    with model_compiler_off(), model_management.cuda_device_context(device):
        model_management.load_models_gpu([model, *model.get_nested_additional_models()], memory_required=extra_bytes)
        try:
            model.pre_run()
            # Dynamic VRAM fetches the weights of a whole block ahead, into buffers that another thread's call would
            # write over. It does so only for a model that knows its patcher.
            model.model.current_patcher = None
            yield model.model.diffusion_model, device
        finally:
            _forget_calls(model)
            model.cleanup()


def replay(model: Any, call: RecordedCall, device: torch.device) -> None:
    """Run the call inside `loaded`, under torch.inference_mode, which each thread has for itself.

    The result is thrown away. Layers see, bit for bit, the inputs of the recorded call, if model, device and ComfyUI
    are the same. Of a model that reuses what an earlier call worked out (HiDream-O1) they see the whole input again.
    """
    arguments = _moved(call.arguments, device)
    options = {**own_options(model), **arguments.pop("transformer_options", {})}
    _forget_calls(model)
    with model_management.cuda_device_context(device):  # a new thread begins on the first device
        model.model.apply_model(**arguments, transformer_options=options)


def _forget_calls(model: Any) -> None:
    """HiDream-O1 keeps a prompt's keys and values for later calls.

    Those of layers under quantization must not get there.
    """
    forget = getattr(model.model.diffusion_model, "clear_kv_cache", None)
    if forget is not None:
        forget()


def own_options(model: Any) -> dict[str, Any]:
    """The transformer_options that a sampler would begin with, without our capture."""
    options = create_model_options_clone(model.model_options).get("transformer_options", {})
    for name in ("wrappers", "callbacks"):
        merge_nested_dicts(options.setdefault(name, {}), getattr(model, name), copy_dict1=False)
    for wrappers in options["wrappers"].values():
        wrappers.pop(KEY, None)
    return options


def _moved(tree: Any, device: torch.device) -> Any:
    """Copies, also on the CPU: some models write into their arguments."""
    if isinstance(tree, torch.Tensor):
        return tree.to(device, copy=True)
    if isinstance(tree, Mapping):
        return {name: _moved(entry, device) for name, entry in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_moved(entry, device) for entry in tree)
    return tree
