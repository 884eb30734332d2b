"""The safetensors header: parsed strictly, written deterministically, no tensor data touched.

File = 8 bytes (header length, little endian) + header (JSON, space-padded) + data section. All offsets count from
the start of the data section.
Source: the README of github.com/huggingface/safetensors, and its tensor.rs for what that leaves open.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import BinaryIO

import torch

from ..errors import InputFileError, RequestError

METADATA_KEY = "__metadata__"
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer ones
MAX_ELEMENTS = 2**63 - 1  # torch counts elements in int64
MAX_DIMS = 64  # TensorIterator's limit

# Every dtype of safetensors 0.8 and its bits per element. F4 and F6 elements are packed without gaps.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
# float8_e8m0fnu came with torch 2.7; a dtype that this torch lacks is handled as raw bytes, like F4 and F6.
CODE_TO_TORCH = {code: getattr(torch, name) for code, name in _TORCH_NAMES.items() if hasattr(torch, name)}
TORCH_TO_CODE = {dtype: code for code, dtype in CODE_TO_TORCH.items()}

# What people rename to .safetensors, or save by mistake: (first bytes, what it is, what to do).
_OTHER_KINDS = (
    (b"PK", "a zip archive (torch writes .pt, .pth and .ckpt files so)", "Convert it to safetensors first."),
    (b"\x80", "a Python pickle (an old torch checkpoint)", "Convert it to safetensors first."),
    (b"GGUF", "a GGUF file", "GGUF is not read; take the safetensors file of the same model."),
    (
        b"version https://git-lfs",
        "a git-lfs pointer, not the file itself",
        "Run `git lfs pull`, or download the file.",
    ),
    (b"<", "a web page (HTML or XML)", "The download failed or needs a login; download the file again."),
    (b"{", "a JSON text", "The download failed, or this is an index; give the model's file."),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. dtype: safetensors code such as "BF16". begin, end: bytes in the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of a file to be written; its place follows from the order and sizes of all of them."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """tensors: by name, in the order of the header's keys. data_start: byte of the file where the data begins."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.data_start + max((info.end for info in self.tensors.values()), default=0)


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes on disk. Raises RequestError: unknown dtype, impossible shape, no whole bytes."""
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise RequestError(f"unknown dtype {short(dtype)}; known: {', '.join(DTYPE_BITS)}")
    # type() and not isinstance(): True is an int to Python, and no dimension to anybody else.
    if not isinstance(shape, (list, tuple)) or any(type(size) is not int or size < 0 for size in shape):
        raise RequestError(f"shape {short(shape)} must be a list of integers >= 0")
    # Zeros count as 1: torch multiplies the other dimensions into strides even when the tensor is empty.
    if len(shape) > MAX_DIMS or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise RequestError(f"shape {short(shape)} is larger than torch can hold (64 dimensions, 2**63 - 1 elements)")
    total_bits = math.prod(shape) * bits
    if total_bits % 8:
        raise RequestError(f"shape {short(shape)} of {bits}-bit {dtype} is not a whole number of bytes")
    return total_bits // 8


def load_json_object(
    data: bytes, what: str, remedy: str = "The file is damaged: download it again."
) -> dict[str, object]:
    """Strict JSON: UTF-8, one object, no key twice at any depth, no NaN or Infinity, no lone surrogates.

    what: names the text in errors ("model.safetensors: the header"). remedy: what to do about text that is not JSON.
    Raises InputFileError.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            raise InputFileError(
                f"{what} has the key {short(repeated[0])} more than once, so its meaning is unclear. "
                "Write the file again with a correct tool."
            )
        return result

    def refuse(number: str) -> float:
        raise InputFileError(f"{what} holds {short(number)}; only finite numbers are allowed. Write it again without.")

    def finite(number: str) -> float:
        value = float(number)
        return refuse(number) if math.isinf(value) else value  # 1e999

    try:
        value = json.loads(str(data, "utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as err:
        raise InputFileError(f"{what} is not UTF-8 text ({err}). {remedy}") from err
    except (ValueError, RecursionError) as err:  # RecursionError: "[[[[...", a million deep
        raise InputFileError(f"{what} is not JSON ({err}). {remedy}") from err
    if not isinstance(value, dict):
        raise InputFileError(f"{what} is a JSON {type(value).__name__}; an object is needed. Give another file.")
    return value


def read_header(file: BinaryIO, path: Path) -> Header:
    """Parse and check the header of an open file (at position 0) against the file's size.

    path: for messages only. Raises InputFileError for everything that the safetensors library refuses, and besides
    for doubled keys, unknown fields and a header that does not begin with "{".
    """
    size = os.fstat(file.fileno()).st_size
    raw_length = file.read(LENGTH_BYTES)
    head = raw_length + file.read(24)
    if size == 0:
        raise InputFileError(f"{path}: the file is empty (0 bytes). Download it again.")
    if size < LENGTH_BYTES:
        raise _wrong_file(path, head, f"the file has only {size} bytes, too short for the 8 bytes of a header length")
    length = int.from_bytes(raw_length, "little")
    claim = f"its first 8 bytes announce a header of {length} bytes"
    if length > MAX_HEADER_BYTES:
        raise _wrong_file(path, head, f"{claim}; at most {MAX_HEADER_BYTES} are allowed")
    if LENGTH_BYTES + length > size:
        raise _wrong_file(path, head, f"{claim}, longer than the file: only {size - LENGTH_BYTES} bytes follow")
    if length == 0 or head[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        raise _wrong_file(path, head, f"{claim}, which does not begin with '{{'")
    file.seek(LENGTH_BYTES)
    raw = load_json_object(file.read(length), f"{path}: the header")
    metadata = _parse_metadata(raw.pop(METADATA_KEY, {}), path)
    header = Header(
        {name: _parse_tensor(name, entry, path) for name, entry in raw.items()}, metadata, LENGTH_BYTES + length
    )
    _check_coverage(header, size, path)
    return header


def _wrong_file(path: Path, head: bytes, found: str) -> InputFileError:
    # 0x80, "PK" or "<" may also begin a lawful header length; followed by anything but zeros, it is none.
    if int.from_bytes(head[:LENGTH_BYTES], "little") > MAX_HEADER_BYTES:
        for magic, kind, todo in _OTHER_KINDS:
            if head.lstrip().startswith(magic):
                return InputFileError(f"{path}: this is {kind}, not a safetensors file. {todo}")
    return InputFileError(f"{path}: {found}. The file is cut off or is not a safetensors file: download it again.")


def _parse_metadata(raw: object, path: Path) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise InputFileError(
            f"{path}: {METADATA_KEY} is {short(raw)}; an object of strings is needed. "
            "Write the file again with a correct tool."
        )
    for key, value in raw.items():
        if not isinstance(value, str):
            raise InputFileError(
                f"{path}: {METADATA_KEY} entry {key!r} is {short(value)}; safetensors allows strings "
                "only. Write the file again with the value as a JSON string."
            )
    return raw


def _parse_tensor(name: str, entry: object, path: Path) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    todo = "The header is damaged: download the file again, or write it with a correct tool."
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != fields:
        found = f"the fields {sorted(entry)}" if isinstance(entry, dict) else short(entry)
        raise InputFileError(f"{where} has {found}; exactly dtype, shape and data_offsets are needed. {todo}")
    try:
        needed = tensor_bytes(entry["dtype"], entry["shape"])
    except RequestError as err:
        raise InputFileError(f"{where}: {err}. {todo}") from err
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(at) is not int or at < 0 for at in offsets):
        raise InputFileError(f"{where}: data_offsets {short(offsets)} must be two integers >= 0. {todo}")
    begin, end = offsets
    if begin > end:
        raise InputFileError(f"{where}: data_offsets begin at {short(begin)}, after their end {short(end)}. {todo}")
    if end - begin != needed:
        raise InputFileError(
            f"{where}: size mismatch: {entry['dtype']} {short(entry['shape'])} needs {needed} bytes, "
            f"data_offsets give {short(end - begin)}. {todo}"
        )
    return TensorInfo(name, entry["dtype"], tuple(entry["shape"]), begin, end)


def _check_coverage(header: Header, size: int, path: Path) -> None:
    """The tensors must fill the data section exactly: no overlap, no hole, nothing missing, nothing left over."""
    covered, before = 0, None
    for info in sorted(header.tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin < covered:
            raise InputFileError(
                f"{path}: tensors {before!r} and {info.name!r} overlap in the file. "
                "The header is damaged: download the file again."
            )
        if info.begin > covered:
            raise InputFileError(
                f"{path}: a hole of {info.begin - covered} bytes lies before tensor {info.name!r}. "
                "The header is damaged: download the file again."
            )
        covered, before = info.end, info.name
    if size < header.file_bytes:
        raise InputFileError(
            f"{path}: the file is truncated: {header.file_bytes - size} bytes are missing "
            f"({size} of {header.file_bytes} are there). Download it again."
        )
    if size > header.file_bytes:
        raise InputFileError(
            f"{path}: {size - header.file_bytes} trailing bytes follow the last tensor. "
            "The file is damaged or two files were joined: download it again."
        )


def build_header(entries: Sequence[OutputTensor], metadata: Mapping[str, str]) -> tuple[Header, bytes]:
    """Lay out a file and write its header: the parsed form, and the first `data_start` bytes of the file.

    Keys stand in the order given, `__metadata__` first when there is any. The data lies in order of falling element
    size (and in the order given within one size), as the safetensors library writes it: so every tensor is aligned to
    its element, which a reader that maps the file needs. Same arguments, same bytes. Raises RequestError.
    """
    sizes: dict[str, int] = {}
    for entry in entries:
        if entry.name in sizes or entry.name == METADATA_KEY:
            raise RequestError(
                f"the output has two entries named {entry.name!r}. Rename or drop one of them."
                if entry.name in sizes
                else f"no tensor can be named {METADATA_KEY}. Rename it."
            )
        try:
            sizes[entry.name] = tensor_bytes(entry.dtype, entry.shape)
        except RequestError as err:
            raise RequestError(f"{entry.name}: {err}. Change the plan for this tensor.") from err
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise RequestError(
                f"header metadata {key!r}: {short(value)}; safetensors holds strings only. "
                "Pass the value as a string, of JSON if need be."
            )
    begins, at = {}, 0
    for entry in sorted(entries, key=lambda entry: -(DTYPE_BITS[entry.dtype] // 8)):
        begins[entry.name] = at
        at += sizes[entry.name]
    tensors = {
        entry.name: TensorInfo(
            entry.name, entry.dtype, tuple(entry.shape), begins[entry.name], begins[entry.name] + sizes[entry.name]
        )
        for entry in entries
    }
    raw = _dump_header(tensors, metadata)
    return Header(tensors, dict(metadata), len(raw)), raw


def _dump_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    for name, info in tensors.items():
        content[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": (info.begin, info.end)}
    try:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as err:
        raise RequestError(f"a tensor name or metadata entry is not valid Unicode text ({err}). Rename it.") from err
    text += b" " * (-len(text) % 8)  # so that the data section begins at a multiple of 8
    if len(text) > MAX_HEADER_BYTES:
        raise RequestError(
            f"the header would take {len(text)} bytes; safetensors allows {MAX_HEADER_BYTES}. "
            "Shorten the metadata, or write fewer tensors."
        )
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
