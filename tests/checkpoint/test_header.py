"""Headers: what the safetensors library accepts is read as it reads it; everything damaged is named and refused."""

import json

import pytest
import safetensors
import safetensors.torch
import torch
from comfyui_quantpress.quant_core.checkpoint.header import (
    CODE_TO_TORCH,
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    OutputTensor,
    build_header,
)
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import InputFileError, PlanError, Problem, some_of
from hypothesis import given, settings
from hypothesis import strategies as st

F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def with_header(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(**changes: object) -> dict[str, object]:
    return {"a": {**F32_PAIR, **changes}}


def pair(begin: int, end: int) -> dict[str, object]:
    return {"a": F32_PAIR, "b": {**F32_PAIR, "data_offsets": [begin, end]}}


BAD_FILES = {
    "empty": (b"", "empty"),
    "short": (b"\x10\0\0", "only 3 bytes, too short"),
    "lying length": (with_header({})[:8] + b"{", "longer than the file: only 1 bytes follow"),
    "huge length": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "at most 100000000 are allowed"),
    "length that looks like a pickle": ((0x280).to_bytes(8, "little") + b"{", "announce a header of 640 bytes"),
    "no header": (bytes(16), "does not begin with '{'"),
    "array": (with_header([1]), "does not begin with '{'"),
    "latin-1": (with_header('{"é": 1}'.encode("latin-1")), "not UTF-8"),
    "surrogate": (with_header(b'{"__metadata__": {"a": "\\ud800"}}'), "not UTF-8"),
    "no JSON": (with_header(b'{"a": '), "not JSON"),
    "NaN": (with_header(b'{"a": NaN}'), "holds 'NaN'; only finite"),
    "deep": (with_header(b'{"a":' + b"[" * 200_000), "not JSON"),
    "doubled tensor": (with_header(b'{"a": 1, "a": 2}'), "'a' more than once"),
    "doubled field": (with_header(b'{"a": {"shape": [], "shape": []}}'), "'shape' more than once"),
    "doubled metadata": (with_header(b'{"__metadata__": {"x": "1", "x": "1"}}'), "'x' more than once"),
    "metadata list": (with_header({"__metadata__": []}), "object of strings is needed"),
    "metadata number": (with_header({"__metadata__": {"steps": 5}}), "'steps' is 5; safetensors allows strings"),
    "entry is a number": (with_header({"a": 5}), "tensor 'a' has 5; exactly dtype"),
    "field missing": (with_header({"a": {"dtype": "F32"}}), r"has the fields \['dtype'\]"),
    "field unknown": (with_header(entry(extra=1), bytes(8)), "has the fields .*'extra'"),
    "dtype unknown": (with_header(entry(dtype="F33"), bytes(8)), "tensor 'a': unknown dtype 'F33'"),
    "dtype no string": (with_header(entry(dtype=["F32"]), bytes(8)), "unknown dtype"),
    "shape no list": (with_header(entry(shape=2), bytes(8)), "shape 2 must be a list of integers"),
    "shape float": (with_header(entry(shape=[2.0]), bytes(8)), r"shape \[2.0\] must be"),
    "shape bool": (with_header(entry(shape=[True, 2]), bytes(8)), r"shape \[True, 2\] must be"),
    "shape negative": (with_header(entry(shape=[-1, -2]), bytes(8)), r"shape \[-1, -2\] must be .* >= 0"),
    "shape overflows": (
        with_header(entry(shape=[0, 2**40, 2**40], data_offsets=[0, 0])),
        "larger than torch can hold",
    ),
    "shape too deep": (with_header(entry(shape=[2] + [1] * 64), bytes(8)), "larger than torch can hold"),
    "sub-byte rest": (with_header(entry(dtype="F4", shape=[3]), bytes(8)), "not a whole number of bytes"),
    "offsets no pair": (with_header(entry(data_offsets=[8]), bytes(8)), "must be two integers"),
    "offsets float": (with_header(entry(data_offsets=[0, 8.0]), bytes(8)), "must be two integers"),
    "offsets negative": (with_header(entry(data_offsets=[-8, 0]), bytes(8)), "must be two integers >= 0"),
    "offsets reversed": (with_header(entry(data_offsets=[8, 0]), bytes(8)), "begin at 8, after their end 0"),
    "size mismatch": (with_header(entry(data_offsets=[0, 12]), bytes(12)), "size mismatch: F32 .* needs 8 .* give 12"),
    "overlap": (with_header(pair(4, 12), bytes(12)), "'a' and 'b' overlap"),
    "shared range": (with_header(pair(0, 8), bytes(8)), "'a' and 'b' overlap"),
    "hole": (with_header(pair(12, 20), bytes(20)), "hole of 4 bytes .* 'b'"),
    "hole at the start": (with_header(entry(data_offsets=[4, 12]), bytes(12)), "hole of 4 bytes .* 'a'"),
    "truncated": (with_header(entry(), bytes(3)), "truncated: 5 bytes are missing"),
    "trailing bytes": (with_header(entry(), bytes(10)), "2 trailing bytes"),
    "zip": (b"PK\x03\x04\0\0\x08\x08" + bytes(40), "zip archive"),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "Python pickle"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(40), "GGUF"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "HTML": (b"\n<!DOCTYPE html><html></html>", "web page"),
    "JSON": (b'{"error": "gated model"}', "JSON text"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_damaged_file_is_refused_with_its_name_and_reason(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match=message) as caught:
        open_source(path)
    assert str(path) in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_mutated_file_is_refused_or_read_as_the_library_reads_it(tmp_path_factory, data):
    content = bytearray(safetensors.torch.save({"a": torch.arange(3), "b": torch.ones(2, 1)}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        until = at + data.draw(st.integers(0, 2))
        content[at:until] = data.draw(st.sampled_from([b"", b"0", b"[", b'"', b"\xff", b" "]))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        src = open_source(path)
    except InputFileError:
        return
    with src:
        ours = {
            info.name: (info.dtype, list(info.shape), src.read_bytes(info.name).numpy().tobytes())
            for info in src.tensors.values()
        }
    library = safetensors.deserialize(bytes(content))
    assert ours == {name: (found["dtype"], found["shape"], bytes(found["data"])) for name, found in library}


names = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(sorted(CODE_TO_TORCH)), shapes), max_size=6),
    st.dictionaries(names, st.text(st.characters(codec="utf-8"), max_size=20), max_size=3),
    st.randoms(),
)
def test_a_file_of_the_library_is_read_bit_for_bit(tmp_path_factory, specs, metadata, rng):
    path = tmp_path_factory.getbasetemp() / "library.safetensors"
    tensors = {}
    for name, (code, shape) in specs.items():
        raw = torch.tensor(list(rng.randbytes(torch.Size(shape).numel() * DTYPE_BITS[code] // 8)), dtype=torch.uint8)
        tensors[name] = (raw % 2 if code == "BOOL" else raw).view(CODE_TO_TORCH[code]).reshape(shape)
    # None: for {} and no tensors the library (0.8) writes a header that it cannot read itself.
    safetensors.torch.save_file(tensors, path, metadata or None)
    with open_source(path) as src:
        assert src.metadata == metadata
        assert set(src.tensors) == set(tensors)
        assert src.nbytes == sum(t.nbytes for t in tensors.values())
        for name, tensor in tensors.items():
            read = src.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("code", DTYPE_BITS)
def test_every_dtype_is_read_also_where_torch_has_none(tmp_path, code):
    header, raw = build_header([OutputTensor("t", code, (2, 4))], {})
    data = bytes(i % 2 for i in range(DTYPE_BITS[code]))
    (tmp_path / "t.safetensors").write_bytes(raw + data)
    ((name, library),) = safetensors.deserialize(raw + data)
    assert (name, library["dtype"], library["shape"]) == ("t", code, [2, 4])
    with open_source(tmp_path / "t.safetensors") as src:
        assert src.read_bytes("t").numpy().tobytes() == data
        tensor = src.read("t")
    if code in CODE_TO_TORCH:
        assert (tensor.dtype, tuple(tensor.shape)) == (CODE_TO_TORCH[code], (2, 4))
    else:
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.uint8, (len(data),))


def test_a_plan_error_shows_all_its_problems_and_long_lists_are_cut():
    error = PlanError(["a: bad", "b: worse"])
    assert error.problems == (Problem("a: bad"), Problem("b: worse"))
    assert str(error) == "2 problems:\n  - a: bad\n  - b: worse"
    assert str(PlanError(["only one"])) == "only one"
    for nothing in ([], "text"):
        with pytest.raises(ValueError, match="non-empty sequence"):
            PlanError(nothing)
    assert some_of(["a", "b", "c"], shown=2) == "a, b, and 1 more"
    assert some_of(["a", "b"], shown=2) == "a, b"
