"""The temporary file beside the target, and what a sink needs of the operating system to handle it.

Functions raise OSError unless they say otherwise; cannot_write makes an OutputError of it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import time
from pathlib import Path

from ..errors import OutputError

_log = logging.getLogger(__name__)

MAX_WRITE_BYTES = 2**30  # macOS refuses more than 2 GiB - 1 at once
STALE_AFTER_S = 3600.0
RESERVE_STEP_BYTES = 64 * 2**20
RESERVE_LIMIT_S = 2.0

HAVE_PWRITE = hasattr(os, "pwrite")  # not on Windows: seek and write, under the lock that every write holds anyway

_ADVICE = {
    errno.ENOSPC: "Free some space, or choose another disk.",
    errno.EROFS: "The file system is read-only: choose another folder.",
    errno.EACCES: "There is no permission to write: choose another folder, or change its permissions.",
    errno.EPERM: "There is no permission to write: choose another folder, or change its permissions.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EFBIG: "The file system allows no file of this size (FAT32: 4 GiB): choose another disk.",
}


def part_path(target: Path) -> Path:
    """A new name beside the target. Its suffix keeps it out of ComfyUI's lists, its pid tells who writes it."""
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(8)}.part")


def remove_stale_parts(target: Path) -> None:
    """Remove parts of this very target that a killed process left: its pid is gone AND they are over an hour old.

    Both, because on a shared folder the pid may be one of another machine.
    """
    pattern = re.compile(re.escape(f".{target.name}.") + r"(\d+)-[0-9a-f]{16}\.part")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        try:
            if match and time.time() - path.stat().st_mtime > STALE_AFTER_S and _process_is_gone(int(match[1])):
                _log.info("%s: removing what a killed run left", path)
                remove(path)
        except FileNotFoundError:  # another process tidies up, too
            continue


def _process_is_gone(pid: int) -> bool:
    if os.name == "nt":
        return True  # os.kill(pid, 0) would send Ctrl-C there; and a file that is still open cannot be removed anyway
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # it lives, and is another user's
        return False
    return False


def remove(path: Path) -> None:
    """Remove a part, if it is there. Raises nothing."""
    try:
        path.unlink(missing_ok=True)
    except OSError as err:  # runs on the way out: it must not hide the error that led here
        _log.warning("%s: cannot be removed (%s). Delete it by hand.", path, err)


def disk_free_bytes(folder: Path) -> int:
    """Free space of the disk that the folder is on."""
    return shutil.disk_usage(folder).free


def reserve(fd: int, size: int) -> None:
    """Give the file its size, and its blocks where that is cheap, so that a full disk shows at once."""
    deadline = time.monotonic() + RESERVE_LIMIT_S
    for at in range(0, size if hasattr(os, "posix_fallocate") else 0, RESERVE_STEP_BYTES):
        # Where the file system cannot (NFS 3, 9p), glibc writes a byte into every block instead: minutes for a model.
        if time.monotonic() > deadline:
            break
        try:
            os.posix_fallocate(fd, at, min(RESERVE_STEP_BYTES, size - at))
        except OSError as err:
            if err.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            break
    os.ftruncate(fd, size)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of data at byte `offset` of the file. Without pwrite it moves the position: one thread at a time."""
    while len(data):
        part = data[:MAX_WRITE_BYTES]
        if HAVE_PWRITE:
            count = os.pwrite(fd, part, offset)
        else:
            os.lseek(fd, offset, os.SEEK_SET)
            count = os.write(fd, part)
        data, offset = data[count:], offset + count


def rename_to_new(part: Path, target: Path) -> None:
    """Rename, but never over an existing file: FileExistsError then."""
    if os.name == "nt":
        os.rename(part, target)  # refuses by itself there
        return
    try:
        os.link(part, target)  # rename would overwrite; link refuses, in one step
    except FileExistsError:
        raise
    except (
        OSError
    ):  # FAT and some network shares have no hard links; what remains is a moment between check and rename
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.replace(part, target)
    else:
        remove(part)


def sync_folder(folder: Path) -> None:
    """Make a renaming in the folder survive a power cut, where the system can. Raises nothing."""
    if os.name == "nt":
        return  # folders cannot be opened there
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as err:  # some file systems cannot; the file is complete and in its place
        _log.warning("%s: the folder could not be flushed (%s); a power cut now may undo the renaming.", folder, err)


def cannot_write(target: Path, err: OSError) -> OutputError:
    """The OutputError for a failed operation of the system: what it said, and what to do."""
    advice = _ADVICE.get(err.errno or 0, "Check the disk, or choose another folder.")
    return OutputError(f"{target}: the file cannot be written: {err.strerror or err}. {advice}")
