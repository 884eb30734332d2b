"""What a MODEL of ComfyUI tells of its state: whether it is compiled, and which weights it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy import cli_args

from ...quant_core.calibration.calibration import fingerprint
from ...quant_core.errors import RequestError

KEY = "quantpress_capture"
COMPILE_KEY = "torch.compile"  # ComfyUI's key of the wrapper that puts the compiled model in at each call
_PLAIN_FLOATS = ("torch.bfloat16", "torch.float16", "torch.float32")


@contextmanager
def model_compiler_off() -> Iterator[None]:
    """Newer ComfyUI replays a model's allocations, and some kernels, without running Python: hooks do not see them."""
    if not hasattr(cli_args.args, "disable_comfy_compiler"):  # added after 0.29
        yield
        return
    before, cli_args.args.disable_comfy_compiler = cli_args.args.disable_comfy_compiler, True
    try:
        yield
    finally:
        cli_args.args.disable_comfy_compiler = before


def compiled() -> RequestError:
    """ComfyUI's own compile node is before or behind the capture: hooks would not see the inputs."""
    return RequestError(
        "The model is compiled (torch.compile), so its layers' inputs cannot be watched. Remove the compile "
        "node while calibrating; the calibration fits the compiled model as well."
    )


def is_plain_float(weight: Any) -> bool:
    """Of an unquantized layer."""
    return str(getattr(weight, "dtype", "")) in _PLAIN_FLOATS and type(weight).__name__ != "QuantizedTensor"


def model_fingerprint(model: Any, modules: dict[str, Any]) -> str:
    """Of the weights as loaded, before any LoRA; "" for a quantized model, whose file has other values."""
    entries = []
    for name, module in modules.items():
        backup = model.backup.get(f"diffusion_model.{name}.weight")
        weight = module.weight if backup is None else backup.weight
        if not is_plain_float(weight) or weight.is_meta:
            return ""
        entries.append((name, tuple(weight.shape), weight.detach().reshape(-1)[:32]))
    return fingerprint(entries)
