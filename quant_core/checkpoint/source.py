"""Reading checkpoints: one .safetensors file, or the shards of an index. Only headers are read at open.

Nothing is mapped into memory: a mapped 8 GB file counts as 8 GB of resident memory once it was read through, so each
tensor is read into memory of its own, which goes with the tensor.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PureWindowsPath
from reprlib import repr as short

import torch
from torch import Tensor

from ..errors import InputFileError, RequestError, counted, some_of
from .closing import Closing
from .header import CODE_TO_TORCH, MAX_HEADER_BYTES, TensorInfo, load_json_object, read_header
from .metadata import HEADER_KEY, merge_header_metadata
from .suffixes import INDEX_SUFFIX, SUFFIX, has_suffix

CHUNK_BYTES = 16 * 2**20
DIFFUSERS_MODELS = ("transformer", "unet", "prior")  # the folder of the diffusion model, by what is most common
MAX_READ_BYTES = 2**30  # Linux reads 2 GiB - 4 KiB at once, macOS refuses more than 2 GiB - 1
EDGE_BYTES = 2**20  # what identity_hash reads at either end of the data

HAVE_PREADV = hasattr(os, "preadv")  # not on Windows: there a lock guards seek and read


def open_source(path: str | Path) -> Source:
    """Open a .safetensors file, a `*.safetensors.index.json` with its shards, or a folder that holds one of these.

    Reads and checks the headers only. Use as a context manager, or call close(). Raises InputFileError.
    """
    path = _locate(Path(path))
    with ExitStack() as stack:
        if path.suffix.lower() != ".json":
            source = Source(path, (stack.enter_context(_Shard(path)),), {})
        else:
            index_stamp = {path: _stamp(path)}
            weight_map = _read_index(path)
            shard_names = sorted(set(weight_map.values()))
            missing = [name for name in shard_names if not (path.parent / name).is_file()]
            if missing:
                raise InputFileError(
                    f"{path}: {len(missing)} of {counted(len(shard_names), 'shard is', 'shards are')} missing: "
                    f"{some_of(missing)}. Download them into the index's folder."
                )
            shards = tuple(stack.enter_context(_Shard(path.parent / name)) for name in shard_names)
            _check_weight_map(path, weight_map, shards)
            source = Source(path, shards, index_stamp)
        stack.pop_all()  # nothing went wrong: the source closes them now
        return source


class Source(Closing):
    """An open checkpoint. Reads are thread-safe. Made by open_source.

    path: the file or index that was opened. files: the .safetensors files, sorted by name.
    tensors: by name, in the order of the files and of the keys in the headers; offsets count within their file.
    metadata: of all headers; the first file wins, except that the layers of `_quantization_metadata` are merged.
    """

    def __init__(self, path: Path, shards: tuple[_Shard, ...], index_stamp: dict[Path, tuple[int, int, int]]) -> None:
        self.path = path
        self.files = tuple(shard.path for shard in shards)
        self._shards = shards
        self._stamps = {**index_stamp, **{shard.path: shard.stamp for shard in shards}}
        self.tensors: dict[str, TensorInfo] = {}
        self._shard_of: dict[str, _Shard] = {}
        self.metadata: dict[str, str] = {}
        for shard in shards:
            self.tensors.update(shard.header.tensors)
            self._shard_of.update(dict.fromkeys(shard.header.tensors, shard))
            self.metadata = {**shard.header.metadata, **self.metadata}
        texts = [shard.header.metadata[HEADER_KEY] for shard in shards if HEADER_KEY in shard.header.metadata]
        if len(texts) > 1:
            self.metadata[HEADER_KEY] = merge_header_metadata(texts)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, headers not counted."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, in memory of its own, writable; bytes exactly as stored.

        A dtype that torch cannot hold (F4, F6_*, and F8_E8M0 before torch 2.7) comes as read_bytes gives it.
        Raises RequestError (no such tensor), InputFileError (the file cannot be read or became shorter).
        """
        info, raw = self._info(name), self.read_bytes(name)
        dtype = CODE_TO_TORCH.get(info.dtype)
        return raw if dtype is None else raw.view(dtype).reshape(info.shape)

    def read_bytes(self, name: str) -> Tensor:
        """The stored bytes: uint8 1-D, in memory of its own. Raises as read does."""
        info = self._info(name)
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        shard = self._shard_of[name]
        shard.read_into(raw.numpy().data, shard.header.data_start + info.begin)
        return raw

    def copy_chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytearray]:
        """The stored bytes in order, in pieces of at most chunk_bytes that are the caller's to keep; none if empty.

        Raises as read does, RequestError also for chunk_bytes < 1.
        """
        info, shard = self._info(name), self._shard_of[name]
        if chunk_bytes < 1:
            raise RequestError(f"{name}: chunk_bytes is {chunk_bytes}; at least 1 is needed.")
        start = shard.header.data_start + info.begin
        return shard.chunks(start, start + info.nbytes, chunk_bytes)

    def identity_hash(self) -> str:
        """sha256 (hex) over, for each file: its size (8 bytes), its header, the first and last 1 MiB of its data.

        Milliseconds for any size, and recorded as `source_hash` in recipes. It tells models apart; it proves no
        integrity: a change amid the data goes unseen.
        """
        digest = hashlib.sha256()
        for shard in self._shards:
            size, start = shard.header.file_bytes, shard.header.data_start
            digest.update(size.to_bytes(8, "little"))
            first, last = (start, min(start + EDGE_BYTES, size)), (max(start, size - EDGE_BYTES), size)
            for begin, end in ((0, start), first, last):
                for chunk in shard.chunks(begin, end, CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise InputFileError if a file was changed, replaced or removed since open. Call it before a commit.

        Compares size, modification time and inode by path: a write within the clock's resolution can go unseen.
        """
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise InputFileError(
                    f"{path}: the file changed while it was being read, so what was read may mix two "
                    "versions. Run again, once nothing writes to it."
                )

    def close(self) -> None:
        """Close the files; reading afterwards is a ValueError."""
        for shard in self._shards:
            shard.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise RequestError(
                f"{self.path}: there is no tensor {name!r}; it holds {len(self.tensors)} others. Check the name."
            )
        return self.tensors[name]


class _Shard(Closing):
    """One open safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Taken before the opening: a file that is swapped in between then differs from its stamp at the end.
        self.stamp = _stamp(path)
        self._lock = threading.Lock()
        with ExitStack() as closing:
            try:
                self._file = closing.enter_context(open(path, "rb"))
                self.header = read_header(self._file, path)
            except OSError as err:
                raise _unreadable(path, err) from err
            closing.pop_all()

    def close(self) -> None:
        self._file.close()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole buffer from byte `offset` of the file."""
        while len(buffer):
            part = buffer[:MAX_READ_BYTES]
            try:
                if HAVE_PREADV:
                    count = os.preadv(self._file.fileno(), [part], offset)
                else:
                    with self._lock:
                        self._file.seek(offset)
                        count = self._file.readinto(part)
            except OSError as err:
                raise _unreadable(self.path, err) from err
            if count == 0:
                raise InputFileError(
                    f"{self.path}: the file ends at byte {offset}, {len(buffer)} bytes too early; it "
                    "was cut off while it was being read. Restore it and run again."
                )
            buffer, offset = buffer[count:], offset + count

    def chunks(self, begin: int, end: int, chunk_bytes: int) -> Iterator[bytearray]:
        """Bytes begin to end of the file, in new buffers of at most chunk_bytes."""
        for offset in range(begin, end, chunk_bytes):
            chunk = bytearray(min(chunk_bytes, end - offset))
            self.read_into(memoryview(chunk), offset)
            yield chunk


def _unreadable(path: Path, err: OSError | ValueError) -> InputFileError:
    reason = getattr(err, "strerror", None) or str(err)
    return InputFileError(f"{path}: the file cannot be read: {reason}. Check the path, the permissions and the disk.")


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except (OSError, ValueError) as err:  # ValueError: a NUL character in the path
        raise _unreadable(path, err) from err
    if not stat.S_ISREG(found.st_mode):  # a pipe would block the opening for ever
        raise InputFileError(f"{path}: this is not a regular file. Give a .safetensors file, an index or a folder.")
    return found.st_size, found.st_mtime_ns, found.st_ino


def _locate(path: Path) -> Path:
    """The file to open: the path itself, or the one index (or else the one .safetensors file) in a folder."""
    if not path.is_dir():
        _stamp(path)
        return path
    found = _models_in(path)
    if len(found) != 1:
        what = f"{len(found)} candidates ({some_of(found)})" if found else "no .safetensors file and no index"
        advice = _parts_advice(path) or "Give the path of the file."
        raise InputFileError(f"{path}: the folder holds {what}; exactly one is needed. {advice}")
    return path / found[0]


def _models_in(folder: Path) -> list[str]:
    """Names of the indexes in a folder, or else of its .safetensors files."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as err:
        raise _unreadable(folder, err) from err
    return [name for name in names if has_suffix(name, INDEX_SUFFIX)] or [
        name for name in names if has_suffix(name, SUFFIX)
    ]


def _parts_advice(root: Path) -> str:
    """Which folder of a model in diffusers' layout to give; "" where it is none."""
    parts = [entry.name for entry in sorted(root.iterdir()) if entry.is_dir() and _models_in(entry)]
    main = next((name for name in DIFFUSERS_MODELS if name in parts), None)
    if main is None:
        return ""
    others = [f"{name}/" for name in parts if name != main]
    beside = f", beside {some_of(others)}" if others else ""
    return f"This is a model in diffusers' layout, with the diffusion model in {main}/{beside}. Give {root / main}."


def _read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name -> file name, every one a plain name of a .safetensors file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_HEADER_BYTES + 1)
    except OSError as err:
        raise _unreadable(path, err) from err
    if len(data) > MAX_HEADER_BYTES:
        raise InputFileError(f"{path}: the index is larger than {MAX_HEADER_BYTES} bytes. Give an index file.")
    weight_map = load_json_object(data, f"{path}: the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputFileError(
            f"{path}: weight_map is {short(weight_map)}; a non-empty object is needed. "
            "Give a *.safetensors.index.json."
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_shard_name(name):
            raise InputFileError(
                f"{path}: tensor {tensor!r} is said to be in {short(name)}; the name of a "
                ".safetensors file in the index's own folder is needed. Get another index."
            )
    return weight_map


def _is_plain_shard_name(name: str) -> bool:
    # By Windows' rules, which know "/", "\\" and "C:", on every system.
    return name == PureWindowsPath(name).name and has_suffix(name, SUFFIX) and "\0" not in name


def _check_weight_map(path: Path, weight_map: dict[str, str], shards: Sequence[_Shard]) -> None:
    """The index and the shards' headers must tell the same story."""
    holders: dict[str, list[str]] = {}
    for shard in shards:
        for name in shard.header.tensors:
            holders.setdefault(name, []).append(shard.path.name)
    problems = [
        f"{name!r} should be in {where} and is not"
        for name, where in weight_map.items()
        if where not in holders.get(name, [])
    ]
    for name, where in holders.items():
        if len(where) > 1:
            problems.append(f"{name!r} is a duplicate, in {' and '.join(where)}")
        elif name not in weight_map:
            problems.append(f"{name!r} in {where[0]} is not in the index")
    if problems:
        raise InputFileError(
            f"{path}: index and shards disagree: {some_of(problems, '; ')}. "
            "Take the index and all shards from one download."
        )
