"""A spool file -> a file under its own name in a folder of ComfyUI, all or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from comfy import model_management

from ...quant_core.checkpoint.part import (
    cannot_write,
    part_path,
    remove,
    remove_stale_parts,
    rename_to_new,
    sync_folder,
)
from ...quant_core.checkpoint.same_file import require_not_source
from ...quant_core.checkpoint.source import open_source
from ...quant_core.checkpoint.suffixes import INDEX_SUFFIX, SUFFIX, has_suffix
from ...quant_core.errors import InputFileError, OutputError
from ...quant_core.pipeline.verify import check_file
from .spool import spool_folder

_COPY_BYTES = 16 << 20


def verified(path: Path) -> None:
    """Raises VerificationError."""
    check_file(path).raise_for_errors()


def publish(
    spool: Path,
    target: Path,
    overwrite: bool,
    check: Callable[[Path], object] = verified,
    origins: Sequence[Path] = (),
) -> None:
    """Give the spool file's contents the name `target`; checked before it shows.

    A hard link where the disk allows: no second copy of a model of many GB, and no time. A spool file is never
    changed. A file outside the spool folder is the user's own and is copied: two names of one file would surprise.
    origins: the user's files that the model comes from; the target must be none of them.
    Raises OutputError, and what `check` does.
    """
    if target.is_dir():
        raise OutputError(f"{target}: this is a folder. Choose another name.")
    keep_origins(target, origins if spool.is_relative_to(spool_folder()) else (*origins, spool))
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


def keep_origins(target: Path, origins: Sequence[Path]) -> None:
    """OutputError where the target is one of these files, or a shard of one, under whatever name."""
    require_not_source(target, [file for path in origins for file in (path, *_shards(path))])


def _shards(path: Path) -> tuple[Path, ...]:
    if not has_suffix(path.name, INDEX_SUFFIX):
        return ()
    try:
        with open_source(path) as src:
            return src.files
    except InputFileError:  # changed since it was read: all that may have been its shards
        return tuple(beside for beside in path.parent.glob("*") if has_suffix(beside.name, SUFFIX))


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
