"""Writing a checkpoint: all or nothing.

The header is complete before the first tensor, since every shape is known from the plan. Everything goes into
`.<target name>.<pid>-<random>.part` beside the target, a name that ComfyUI's model lists (which go by suffix) never
show; commit() checks it and renames it. Whatever goes wrong before that leaves nothing under the target's name.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from ..cancel import poll
from ..errors import InputFileError, OutputError, Remedy, RequestError, VerificationError, some_of
from .closing import Closing
from .header import CODE_TO_TORCH, Header, OutputTensor, TensorInfo, build_header, read_header
from .part import (
    cannot_write,
    disk_free_bytes,
    part_path,
    remove,
    remove_stale_parts,
    rename_to_new,
    reserve,
    sync_folder,
    write_at,
)
from .same_file import require_not_source
from .source import CHUNK_BYTES, Source
from .suffixes import SUFFIX


def open_sink(
    target: str | Path,
    entries: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    overwrite: bool = False,
    sources: Sequence[Path] = (),
    free_bytes: Callable[[Path], int] = disk_free_bytes,
) -> Sink:
    """Check everything that can be checked, then open a file to be written that holds exactly `entries`.

    sources: files that are being read; the target must be none of them, under whatever name or link. A target that is
    a symlink is replaced itself, not the file it points to. free_bytes: of the disk a folder is on; tests replace it.
    Raises RequestError (entries or metadata that no safetensors file can hold) and OutputError (all else).
    """
    target = Path(target)
    header, raw_header = build_header(entries, metadata)
    try:
        _check_target(target, overwrite, sources)
        remove_stale_parts(target)
        free = free_bytes(target.parent)
        if free < header.file_bytes:
            # An overwritten file frees nothing: it stays until the new one is complete.
            raise OutputError(
                f"{target}: the file needs {header.file_bytes / 1e9:.3f} GB of disk space, and only "
                f"{free / 1e9:.3f} GB are free. Free some, or choose another disk."
            )
        return Sink(target, header, raw_header, overwrite)
    except OSError as err:
        raise cannot_write(target, err) from err


class Sink(Closing):
    """A file that is being written. Writing is thread-safe. Made by open_sink; a context manager.

    target: where it will be. part: where it is until commit. tensors: the layout, as a reader will see it.
    """

    def __init__(self, target: Path, header: Header, raw_header: bytes, overwrite: bool) -> None:
        self.target = target
        self.part = part_path(target)
        self.tensors: dict[str, TensorInfo] = header.tensors
        self._header = header
        self._overwrite = overwrite
        self._lock = threading.Lock()
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in header.tensors}
        self._copies: dict[str, tuple[Path, int]] = {}  # by name: where from, and the CRC-32 of what was read there
        self._committed = False
        self._broken = False
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._fd: int | None = os.open(self.part, flags, 0o666)
        with ExitStack() as undo:
            undo.callback(self.close)
            reserve(self._fd, header.file_bytes)
            write_at(self._fd, memoryview(raw_header), 0)
            undo.pop_all()

    @property
    def nbytes(self) -> int:
        """Size of the whole file, header included."""
        return self._header.file_bytes

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor, from any device and of any strides; its dtype and shape must be the plan's.

        A dtype that torch cannot hold takes what Source.read gives for it: the bytes, uint8 1-D.
        Raises RequestError (not as planned, or written before), OutputError (the disk).
        """
        info = self._info(name)
        self._put(info, 0, _tensor_bytes(info, tensor))

    def write_chunk(self, name: str, offset: int, chunk: bytes | bytearray | memoryview) -> None:
        """Write bytes of a tensor, `offset` bytes from its beginning; chunks in any order. Raises as write does."""
        self._put(self._info(name), offset, memoryview(chunk).cast("B"))

    def copy(self, src: Source, name: str, new: str | None = None) -> None:
        """Write a tensor's bytes as `src` holds them; commit checks that the file then holds what was read.

        name: in the source. new: in this file, the same by default. Raises as write and Source.read do, and Cancelled.
        """
        new = name if new is None else new
        offset = checksum = 0
        for chunk in src.copy_chunks(name):
            poll()
            self.write_chunk(new, offset, chunk)
            checksum = zlib.crc32(chunk, checksum)
            offset += len(chunk)
        self._copies[new] = src.path, checksum

    def commit(self, verify: Callable[[Path], None] | None = None) -> None:
        """Check that all is there, flush, read header and copies back, call verify(part), and give the file its name.

        verify: may open the finished part; what it raises leaves the target as it was. Raises OutputError (tensors
        missing, the disk, a target that appeared meanwhile), VerificationError (read back differently).
        """
        with self._lock:
            fd = self._open_fd()
            missing = [
                name
                for name, info in self.tensors.items()
                if info.nbytes and self._written[name] != [(0, info.nbytes)]
            ]
            if missing:
                raise OutputError(
                    f"{self.target}: {len(missing)} of {len(self.tensors)} tensors were not, or not "
                    f"completely, written: {some_of(missing)}. Write them before commit."
                )
            try:
                os.fsync(fd)
                self._close_fd()  # Windows renames no open file
            except OSError as err:
                raise cannot_write(self.target, err) from err
        self._check_readable()
        if verify is not None:
            verify(self.part)
        self._publish()

    def close(self) -> None:
        """Remove the part, unless it was committed."""
        with self._lock:
            try:
                self._close_fd()
            finally:
                if not self._committed:
                    remove(self.part)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise RequestError(
                f"{self.target}: tensor {name!r} is not in the plan, which fixed the header. Add it to the plan."
            )
        return self.tensors[name]

    def _open_fd(self) -> int:
        if self._fd is None:
            raise ValueError(f"{self.target}: the sink is closed")
        if self._broken:
            raise OutputError(f"{self.target}: an earlier write failed, so the file is incomplete. Run again.")
        return self._fd

    def _close_fd(self) -> None:
        # Forgotten first: closing twice could close a file that another thread opened under the same number.
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _put(self, info: TensorInfo, offset: int, data: memoryview) -> None:
        with self._lock:
            fd = self._open_fd()
            self._written[info.name] = _claimed(self._written[info.name], info, offset, len(data))
            self._broken = True  # until the write came through: an interrupted one must never be committed
            try:
                write_at(fd, data, self._header.data_start + info.begin + offset)
            except OSError as err:
                raise cannot_write(self.target, err) from err
            self._broken = False

    def _check_readable(self) -> None:
        try:
            with open(self.part, "rb") as file:
                if read_header(file, self.part) != self._header:
                    raise VerificationError(
                        f"{self.target}: the header reads back differently from what was written. "
                        "Check the disk, and that nothing else writes there; then run again."
                    )
                self._check_copies(file)
        except InputFileError as err:
            raise VerificationError(
                f"{self.target}: what was written cannot be read back ({err}). Check the disk, then run again."
            ) from err
        except OSError as err:
            raise cannot_write(self.target, err) from err

    def _check_copies(self, file: BufferedReader) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for name, (path, expected) in self._copies.items():
            info, checksum = self.tensors[name], 0
            file.seek(self._header.data_start + info.begin)
            for begin in range(0, info.nbytes, CHUNK_BYTES):
                poll()
                part = buffer[: min(CHUNK_BYTES, info.nbytes - begin)]
                checksum = zlib.crc32(part[: file.readinto(part)], checksum)
            if checksum != expected:
                raise VerificationError(f"{name}: reads back differently from {path}. Check the disk, then run again.")

    def _publish(self) -> None:
        try:
            if self._overwrite:
                os.replace(self.part, self.target)
            else:
                rename_to_new(self.part, self.target)
        except FileExistsError as err:
            raise OutputError(
                f"{self.target}: a file of this name appeared while ours was being written, and was "
                "kept. Choose another name.",
                "overwrite",
                Remedy.REPLACE,
            ) from err
        except OSError as err:
            raise cannot_write(self.target, err) from err
        self._committed = True
        sync_folder(self.target.parent)


def _check_target(target: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    folder = target.parent
    if target.is_dir():
        raise OutputError(f"{target}: the target is a directory; a file is needed. Add a name ending in .safetensors.")
    if target.suffix.lower() != SUFFIX:
        raise OutputError(f"{target}: the name must end in .safetensors, or ComfyUI will not list it. Rename it.")
    if not folder.is_dir():
        raise OutputError(f"{target}: the folder {folder} is missing. Create it, or correct the path.")
    require_not_source(target, sources)
    if not overwrite and os.path.lexists(target):
        raise OutputError(f"{target}: the target exists. Choose another name.", "overwrite", Remedy.REPLACE)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(
            f"{target}: the folder {folder} is not writable. Choose another folder, or change its permissions."
        )


def _claimed(ranges: list[tuple[int, int]], info: TensorInfo, offset: int, count: int) -> list[tuple[int, int]]:
    """The written byte ranges of a tensor with one more: sorted, neighbours merged. Raises RequestError."""
    end = offset + count
    if offset < 0 or end > info.nbytes:
        raise RequestError(
            f"{info.name}: bytes {offset} to {end} were to be written; the plan gives it {info.nbytes}. "
            "Write what was planned."
        )
    if any(offset < other_end and other_begin < end for other_begin, other_end in ranges):
        raise RequestError(
            f"{info.name}: bytes {offset} to {end} were written before, at least in part. Write every tensor once."
        )
    merged: list[tuple[int, int]] = []
    for begin, stop in sorted([*ranges, (offset, end)] if count else ranges):
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((begin, stop))
    return merged


def _tensor_bytes(info: TensorInfo, tensor: Tensor) -> memoryview:
    # A quantized tensor subclass reports its logical dtype and shape, and holds other bytes.
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.layout is not torch.strided:
        raise RequestError(
            f"{info.name}: a plain dense tensor is needed, {type(tensor).__name__} on {tensor.device} "
            f"({tensor.layout}) was given. Expand it into its stored tensors first."
        )
    dtype, shape = CODE_TO_TORCH.get(info.dtype), info.shape
    if dtype is None:
        dtype, shape = torch.uint8, (info.nbytes,)
    if tensor.dtype is not dtype or tuple(tensor.shape) != shape:
        raise RequestError(
            f"{info.name}: {tensor.dtype} {tuple(tensor.shape)} was given; the plan says {info.dtype} "
            f"{info.shape}, which is {dtype} {shape}. Cast it, or correct the plan."
        )
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().data
