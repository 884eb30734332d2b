"""Whether Triton kernels can run on a device, answered from facts before any is called."""

from __future__ import annotations

import os
import shutil
import sys
from functools import lru_cache
from importlib.util import find_spec

import torch


def runs_triton(device: torch.device) -> bool:
    return not obstacle(device)


def obstacle(device: torch.device) -> str:
    """Why no kernels run on the device, as a phrase; empty where they do. Cached per device."""
    return _obstacle(numbered(device))


def numbered(device: torch.device) -> torch.device:
    """The device with its number: "cuda" alone is the current one."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device
    )


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) where there is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@lru_cache(maxsize=64)
def _obstacle(device: torch.device) -> str:
    return judge(
        device.type,
        capability_of(device),
        is_rocm=torch.version.hip is not None,
        has_triton=find_spec("triton") is not None,
        has_compiler=_has_c_compiler(),
    )


def judge(kind: str, capability: tuple[int, int], *, is_rocm: bool, has_triton: bool, has_compiler: bool) -> str:
    """The rule of `obstacle`, from plain facts."""
    reasons = [
        (kind != "cuda", f"there are no kernels for {kind} devices"),
        (is_rocm, "the kernels were never tried on ROCm"),
        (capability < (8, 0), f"Triton needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"),
        (not has_triton, "the package triton is not installed (on Windows: triton-windows)"),
        (not has_compiler, "Triton needs a C compiler: install gcc, or set CC"),
    ]
    return next((text for applies, text in reasons if applies), "")


def _has_c_compiler() -> bool:
    # triton-windows brings its own.
    return sys.platform == "win32" or bool(os.environ.get("CC")) or any(map(shutil.which, ("gcc", "clang", "cc")))
