"""What travels along the wires: frozen descriptions of files, never weights."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ...quant_core.checkpoint.suffixes import INDEX_SUFFIX, SUFFIX, without_suffix
from ...quant_core.errors import InputFileError

CATEGORY = "QuantPress"
SourceType = io.Custom("QUANTPRESS_SOURCE")
QuantizedType = io.Custom("QUANTPRESS_MODEL")
CaptureType = io.Custom("QUANTPRESS_CAPTURE")
CalibrationType = io.Custom("QUANTPRESS_CALIBRATION")

# Spool files that a live handle names; the graph's cache decides how long a handle lives.
_held: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True, eq=False)
class SourceHandle:
    """A model to be quantized. path: a .safetensors file or the index of its shards. label: its name, for file names.

    maker: the node that wrote the spool file; None for a user's file.
    origins: the user's files that the spool file was made from; see origins_of.
    """

    path: Path
    label: str
    maker: str | None = None
    origins: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        _held.add(self)


@dataclass(frozen=True, eq=False)
class QuantizedHandle:
    """A quantized model in one file: a spool file, or a file of the user's, which no node changes.

    label: the source's name, for file names. maker: the node that wrote the spool file; None for a user's file.
    lenient: it comes from a user's file, or was edited by force, so it may break the loaders' rules; saving then says
    so and does not refuse.
    lora: a spool file with the low-rank part of what quantizing lost; None where none was asked for.
    origins: as for SourceHandle.
    """

    path: Path
    label: str
    maker: str | None = "Quantize Model"
    lenient: bool = False
    lora: Path | None = None
    origins: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        _held.add(self)


@dataclass(frozen=True, eq=False)
class CalibrationHandle:
    """A calibration: a spool file, or a saved one. label: of the model, or the file's name."""

    path: Path
    label: str

    def __post_init__(self) -> None:
        _held.add(self)


def spool_of(handle: SourceHandle | QuantizedHandle | CalibrationHandle) -> Path:
    """The handle's file, which someone may have removed with the temporary folder. Raises InputFileError."""
    if not handle.path.is_file():
        maker = "Capture Activations" if isinstance(handle, CalibrationHandle) else handle.maker
        if maker is None:
            raise InputFileError(
                f"{handle.path.name} is not there any more. Press R to refresh the lists, and choose again."
            )
        raise InputFileError(
            f"{handle.path.name} is gone from ComfyUI's temporary folder. Change any input of {maker}, "
            "the seed for example, and run again."
        )
    return handle.path


def origins_of(*handles: SourceHandle | QuantizedHandle) -> tuple[Path, ...]:
    """The user's files that these models come from, their own included: what saving the result must not replace."""
    found = [path for handle in handles for path in handle.origins]
    found += [handle.path for handle in handles if handle.maker is None]
    return tuple(dict.fromkeys(found))


def held_files() -> set[Path]:
    """Every file that some handle of this process still names."""
    loras = {handle.lora for handle in _held if isinstance(handle, QuantizedHandle) and handle.lora is not None}
    return {handle.path for handle in _held} | loras


def label_of(path: Path) -> str:
    """The file's name without suffixes, for the names of results."""
    return without_suffix(path.name, INDEX_SUFFIX, SUFFIX, ".sft")


def model_input(name: str, tooltip: str) -> Any:
    """An input that takes a quantized model and a source alike."""
    return io.MultiType.Input(name, types=[QuantizedType, SourceType], tooltip=tooltip)
