"""A spool file -> a file under its own name in a folder of ComfyUI, all or nothing."""
from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..quant_core.checkpoint.part import cannot_write, part_path, remove, remove_stale_parts, rename_to_new, sync_folder
from ..quant_core.errors import OutputError, RequestError
from ..quant_core.verify import check_file
from ._handles import QuantizedHandle

DEFAULT_PATTERN = "{model}-{format}"
_TOKEN = re.compile(r"\{(\w*)\}")


def expand(pattern: str, handle: QuantizedHandle) -> str:
    """The pattern with its tokens replaced. RequestError for one that is not known."""
    values = tokens(handle.label, handle.report)

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise RequestError(f"{match[0]} is no token. Known tokens: {', '.join('{%s}' % name for name in values)}.")
        return values[match[1]]

    return _TOKEN.sub(value, pattern)


def tokens(label: str, report: Mapping[str, Any]) -> dict[str, str]:
    recipe, now = report["recipe"], time.localtime()
    return {"model": label, "format": recipe["format"], "group_size": str(recipe.get("group_size") or "whole"),
            "rounding": recipe["rounding"], "seed": str(recipe["seed"]), "bits": f"{report['bits_per_weight']:.1f}",
            "date": time.strftime("%Y-%m-%d", now), "time": time.strftime("%H%M%S", now)}


def verified(path: Path) -> None:
    """Raises VerificationError."""
    check_file(path).raise_for_errors()


def publish(spool: Path, target: Path, overwrite: bool, check: Callable[[Path], object] = verified) -> None:
    """Give the spool file's contents the name `target`; checked before it shows. Raises OutputError, and what `check` does.

    A hard link where the disk allows: no second copy of a model of many GB, and no time. A spool file is never changed.
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
        raise OutputError(f"{target}: a file of this name appeared meanwhile, and was kept. Choose another name.") from err
    except OSError as err:
        raise cannot_write(target, err) from err
    finally:
        remove(part)


def _link_or_copy(spool: Path, part: Path) -> None:
    try:
        os.link(spool, part)
    except OSError:      # another disk, or a file system without links
        shutil.copyfile(spool, part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
