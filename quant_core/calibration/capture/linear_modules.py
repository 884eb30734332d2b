"""Finding a live model's linear layers, and refusing models whose layers cannot be watched."""

from __future__ import annotations

import re
import sys
from typing import Any

from torch import nn

from ...errors import RequestError


def linear_modules(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Module]:
    """Name -> module of every linear layer, in the model's order. pattern: a regex that a name must contain.

    A linear layer is an nn.Linear, or any other class called Linear with integer in_features and out_features:
    ComfyUI's quantized one derives from nn.Module alone. RequestError when the model is compiled or none is found.
    """
    refuse_compiled(model)
    wanted = re.compile(pattern) if pattern else None
    found = {
        name: module
        for name, module in model.named_modules()
        if name and _is_linear(module) and (wanted is None or wanted.search(name))
    }
    if not found:
        what = f" whose name matches {pattern!r}" if pattern else ""
        raise RequestError(f"{type(model).__name__} has no linear layer{what}. Check the model and the pattern.")
    return found


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a module that `linear_modules` found."""
    sizes: Any = layer
    return sizes.out_features, sizes.in_features


def refuse_compiled(model: nn.Module) -> None:
    """RequestError when the model, or a part of it, runs through torch.compile: its hooks would not see the inputs."""
    # A model can be an OptimizedModule only if its module was imported; importing it here would take seconds.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    for name, module in model.named_modules():
        wrapped = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
        if wrapped or getattr(module, "_compiled_call_impl", None) is not None:
            raise RequestError(
                f"{name or type(model).__name__}: the model is compiled (torch.compile), so its layers' "
                "inputs cannot be watched. Remove the compile node while calibrating."
            )


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    sizes = [getattr(module, field, None) for field in ("in_features", "out_features")]
    return type(module).__name__ == "Linear" and all(type(size) is int for size in sizes)
