"""Keeps the C heap from hoarding freed weights."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # <malloc.h>
_THRESHOLD_BYTES = 4 << 20


def give_freed_weights_back() -> None:
    """glibc only, else nothing: blocks over 4 MiB go back to the system when they are freed.

    By default glibc raises that limit to 32 MiB as blocks are freed; with a reading, a computing and a writing thread
    its heaps then hold 150 MB of freed weights. For the command only: inside ComfyUI the process is not ours.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
