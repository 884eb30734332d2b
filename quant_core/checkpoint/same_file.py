"""The file to be written must be none of the files that the result is made from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import OutputError


def is_same_file(one: Path, other: Path) -> bool:
    """Whether both names lead to one file: symlinks, hard links, other spellings, disks that ignore case.

    False where one of the two is not there.
    """
    try:
        return os.path.samefile(one, other)  # follows symlinks; device and inode tell hard links and spellings
    except (OSError, ValueError):  # not there, or no path at all: then nothing is lost
        return False


def require_not_source(target: Path, sources: Iterable[Path]) -> None:
    """OutputError, naming both, where the target is one of the sources under whatever name, overwriting or not."""
    for source in sources:
        if is_same_file(target, source):
            raise OutputError(
                f"{target}: the target is the same file as the source {source}, which would be lost. "
                "Choose another name."
            )
