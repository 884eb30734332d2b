"""A spool file -> a file under its own name in a folder of ComfyUI, all or nothing."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from comfy import model_management

from ...quant_core.checkpoint.header import load_json_object
from ...quant_core.checkpoint.metadata import CONFIG_SUFFIX
from ...quant_core.checkpoint.part import (
    cannot_write,
    part_path,
    remove,
    remove_stale_parts,
    rename_to_new,
    sync_folder,
)
from ...quant_core.checkpoint.source import Source, open_source
from ...quant_core.errors import InputFileError, OutputError, RequestError
from ...quant_core.pipeline.plan import RECIPE_KEY
from ...quant_core.pipeline.verify import check_file
from ...quant_core.stored.layers import stored_layers
from ..shared.folders import LORAS, write_target
from ..shared.handles import QuantizedHandle
from ..shared.spool import spool_folder

UNKNOWN = "unknown"
DEFAULT_PATTERN = "{model}-{format}"
_COPY_BYTES = 16 << 20
_TOKEN = re.compile(r"\{(\w*)\}")


def expand(pattern: str, handle: QuantizedHandle) -> str:
    """The pattern with its tokens replaced. RequestError for one that is not known."""
    if not _TOKEN.search(pattern):
        return pattern
    values = tokens(handle)

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise RequestError(
                f"{match[0]} is not a token. Known tokens: {', '.join('{%s}' % name for name in values)}."
            )
        return values[match[1]]

    return _TOKEN.sub(value, pattern)


def tokens(handle: QuantizedHandle) -> dict[str, str]:
    """From the file: its layers, and the recipe in its header. What a file of another tool does not tell is "unknown"."""
    with open_source(handle.path) as src:
        try:
            layers = stored_layers(src)
        except InputFileError:  # a damaged file, saved under a name of its own all the same
            layers = {}
        recipe, formats = recorded_recipe(src), Counter(layer.format.name for layer in layers.values())
        names = {
            name for layer in layers.values() for name in (*layer.names.values(), f"{layer.layer}{CONFIG_SUFFIX}")
        }
        size = sum(src.tensors[name].nbytes for name in names if name in src.tensors)
    weights, now = sum(layer.shape[0] * layer.shape[1] for layer in layers.values()), time.localtime()
    values = {name: str(recipe.get(name, UNKNOWN)) for name in ("format", "group_size", "rounding", "seed")}
    if "format" not in recipe:
        values["format"] = formats.most_common(1)[0][0] if formats else UNKNOWN
    elif recipe.get("group_size") is None:
        values["group_size"] = "whole"
    return {
        "model": handle.label,
        **values,
        "bits": f"{size * 8 / weights:.1f}" if weights else UNKNOWN,
        "date": time.strftime("%Y-%m-%d", now),
        "time": time.strftime("%H%M%S", now),
    }


def recorded_recipe(src: Source) -> Mapping[str, Any]:
    """The recipe that Quantize Model or the command line left in the header; {} in files of other tools."""
    try:
        record = load_json_object(src.metadata.get(RECIPE_KEY, "{}").encode("utf-8", "replace"), RECIPE_KEY)
    except InputFileError:
        return {}
    recipe = record.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def check_of(handle: QuantizedHandle) -> Callable[[Path], object]:
    """What a saved file must pass: the loaders' rules, or for a lenient one that it can be read at all."""
    return readable if handle.lenient else verified


def warnings_of(handle: QuantizedHandle) -> list[str]:
    """What a loader would stumble over in a lenient file."""
    return [f"warning: {finding.message}" for finding in check_file(handle.path).errors] if handle.lenient else []


def verified(path: Path) -> None:
    """Raises VerificationError."""
    check_file(path).raise_for_errors()


def readable(path: Path) -> None:
    """Raises InputFileError."""
    with open_source(path):
        pass


def publish(spool: Path, target: Path, overwrite: bool, check: Callable[[Path], object] = verified) -> None:
    """Give the spool file's contents the name `target`; checked before it shows. Raises OutputError, and what `check` does.

    A hard link where the disk allows: no second copy of a model of many GB, and no time. A spool file is never changed.
    A file that is not in the spool folder is the user's own, and copied: two names of one file would surprise.
    """
    if target.is_dir():
        raise OutputError(f"{target}: this is a folder. Choose another name.")
    if not overwrite and os.path.lexists(target):
        raise OutputError(f"{target}: the file exists. Choose another name, or switch overwrite on.")
    part = part_path(target)
    try:
        remove_stale_parts(target)
        _link_or_copy(spool, part)
        check(part)
        if overwrite:
            os.replace(part, target)
        else:
            rename_to_new(part, target)
        sync_folder(target.parent)
    except FileExistsError as err:
        raise OutputError(
            f"{target}: a file of this name appeared meanwhile, and was kept. Choose another name."
        ) from err
    except OSError as err:
        raise cannot_write(target, err) from err
    finally:
        remove(part)


def lora_target(handle: QuantizedHandle, name: str, overwrite: bool) -> tuple[str, Path] | None:
    """(name as the loaders list it, file) for the low-rank part of a model that is saved as `name`; None without one.

    Raises InputFileError: its spool file is gone; OutputError: the name is taken.
    """
    if handle.lora is None:
        return None
    if not handle.lora.is_file():
        raise InputFileError(
            f"{handle.lora.name} is gone from ComfyUI's temporary folder. Change any input of Quantize Model, the "
            "seed for example, and run again."
        )
    listed = name.removesuffix(".safetensors").strip().replace("\\", "/") + "-residual.safetensors"
    target = write_target(LORAS, listed)
    if not overwrite and os.path.lexists(target):
        raise OutputError(f"{target}: the file exists. Choose another name, or switch overwrite on.")
    return listed, target


def _link_or_copy(spool: Path, part: Path) -> None:
    if spool.is_relative_to(spool_folder()):
        try:
            os.link(spool, part)
            return
        except OSError:  # another disk, or a file system without links
            pass
    with open(spool, "rb") as source, open(part, "xb") as file:
        while chunk := source.read(_COPY_BYTES):
            model_management.throw_exception_if_processing_interrupted()
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
