"""Writing: what was planned and written is what the library and our reader read, from whatever threads and strides."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from comfyui_quantpress.quant_core.checkpoint import part as part_module
from comfyui_quantpress.quant_core.checkpoint.header import CODE_TO_TORCH, DTYPE_BITS, MAX_HEADER_BYTES, build_header
from comfyui_quantpress.quant_core.checkpoint.sink import OutputTensor, open_sink
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import OutputError, RequestError, VerificationError
from hypothesis import given, settings
from hypothesis import strategies as st

PLAN = (
    OutputTensor("a", "U8", (3,)),
    OutputTensor("w", "BF16", (2, 3)),
    OutputTensor("s", "F32", ()),
    OutputTensor("none", "F32", (0, 4)),
)
TENSORS = {
    "a": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "s": torch.tensor(0.5),
}


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "out" / "model.safetensors"


@pytest.fixture(autouse=True)
def folder(target) -> Path:
    target.parent.mkdir()
    return target.parent


names = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(sorted(CODE_TO_TORCH)), shapes), max_size=6),
    st.dictionaries(names, st.text(st.characters(codec="utf-8"), max_size=20), max_size=3),
    st.randoms(),
)
def test_what_is_written_the_library_and_our_reader_read_bit_for_bit(tmp_path_factory, specs, metadata, rng):
    target = tmp_path_factory.getbasetemp() / "written.safetensors"
    tensors = {}
    for name, (code, shape) in specs.items():
        raw = torch.tensor(list(rng.randbytes(torch.Size(shape).numel() * DTYPE_BITS[code] // 8)), dtype=torch.uint8)
        tensors[name] = (raw % 2 if code == "BOOL" else raw).view(CODE_TO_TORCH[code]).reshape(shape)
    entries = [OutputTensor(name, code, shape) for name, (code, shape) in specs.items()]
    with open_sink(target, entries, metadata, overwrite=True) as sink:
        for name in rng.sample(list(tensors), len(tensors)):
            sink.write(name, tensors[name])
        sink.commit()
    with safetensors.safe_open(target, "pt") as library, open_source(target) as src:
        assert (library.metadata() or {}) == src.metadata == metadata
        assert list(src.tensors) == list(specs)  # the order of the plan
        assert set(library.keys()) == set(specs)
        for name, tensor in tensors.items():
            for read in (library.get_tensor(name), src.read(name)):
                assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
                assert read.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
            # A reader that maps the file needs every tensor aligned to its element.
            begin = os.path.getsize(target) - src.nbytes + src.tensors[name].begin
            assert begin % tensor.element_size() == 0


def test_same_plan_same_bytes_whatever_the_order_of_writing(target):
    files = []
    for order in (list(TENSORS), list(reversed(TENSORS))):
        with open_sink(target, PLAN, {"b": "1", "a": "é"}, overwrite=True) as sink:
            for name in order:
                sink.write(name, TENSORS[name])
            sink.commit()
            assert sink.nbytes == target.stat().st_size
        files.append(target.read_bytes())
    assert files[0] == files[1]
    assert files[0][8:].startswith('{"__metadata__":{"b":"1","a":"é"},"a":{"dtype":"U8","shape":[3],'.encode())
    assert int.from_bytes(files[0][:8], "little") % 8 == 0


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "BF16"])
def test_a_tensor_is_copied_in_chunks_or_whole_with_its_bytes_kept(target, tmp_path, code):
    entries = [OutputTensor("t", code, (8, 100)), OutputTensor("z", code, (0,))]
    header, raw = build_header(entries, {})
    data = random.Random(0).randbytes(header.tensors["t"].nbytes)
    (tmp_path / "in.safetensors").write_bytes(raw + data)
    for in_chunks in (True, False):
        with open_source(tmp_path / "in.safetensors") as src, open_sink(target, entries, {}, overwrite=True) as sink:
            offset = 0
            for chunk in src.copy_chunks("t", 77) if in_chunks else ():
                sink.write_chunk("t", offset, chunk)
                offset += len(chunk)
            if not in_chunks:
                sink.write("t", src.read("t"))
                sink.write("z", src.read("z"))
            sink.commit()
        assert target.read_bytes() == raw + data


def test_strided_and_conjugated_tensors_and_parameters_are_written_as_what_they_mean(target):
    w = torch.arange(6.0).reshape(2, 3)
    c = torch.tensor([1 + 2j, 3 - 1j]).conj()
    given = {
        "t": w.T,
        "step": torch.arange(8)[::2],
        "expanded": torch.tensor([7.0]).expand(3),
        "conj": c,
        "parameter": torch.nn.Parameter(w),
    }
    codes = {"t": "F32", "step": "I64", "expanded": "F32", "conj": "C64", "parameter": "F32"}
    with open_sink(target, [OutputTensor(n, codes[n], tuple(t.shape)) for n, t in given.items()], {}) as sink:
        for name, tensor in given.items():
            sink.write(name, tensor)
        sink.commit()
    for name, tensor in safetensors.torch.load_file(target).items():
        assert tensor.equal(given[name].detach().resolve_conj()), name


@pytest.mark.parametrize("have_pwrite", [True, False])
def test_writes_from_many_threads_do_not_mix(target, monkeypatch, have_pwrite):
    if have_pwrite and not part_module.HAVE_PWRITE:
        pytest.skip("this system has no os.pwrite")
    monkeypatch.setattr(part_module, "HAVE_PWRITE", have_pwrite)
    if not have_pwrite:
        lseek = os.lseek
        monkeypatch.setattr(os, "lseek", lambda *where: (lseek(*where), time.sleep(1e-5))[0])  # other threads' turn
        monkeypatch.delattr(os, "pwrite", raising=False)
    monkeypatch.setattr(part_module, "MAX_WRITE_BYTES", 100)  # many short writes, which would interleave
    given = {f"t{i}": torch.randint(0, 256, (1000 + i,), dtype=torch.uint8) for i in range(60)}
    with open_sink(target, [OutputTensor(n, "U8", tuple(t.shape)) for n, t in given.items()], {}) as sink:

        def copy(name: str) -> None:
            if not name.endswith("0"):
                sink.write(name, given[name])
                return
            data = given[name].numpy().data
            sink.write_chunk(name, 500, data[500:])
            sink.write_chunk(name, 0, data[:500])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(copy, given))
        sink.commit()
    read = safetensors.torch.load_file(target)
    assert all(read[name].equal(tensor) for name, tensor in given.items())


class Logical(torch.Tensor):
    """Like a quantized tensor: its dtype and shape say nothing of its bytes."""


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", torch.zeros(3), "'b' is not in the plan"),
        ("w", torch.zeros(2, 3), r"w: torch.float32 \(2, 3\) was given; the plan says BF16 \(2, 3\)"),
        ("w", torch.zeros(3, 2, dtype=torch.bfloat16), r"w: torch.bfloat16 \(3, 2\) was given"),
        ("s", torch.zeros(1), r"s: torch.float32 \(1,\) was given; the plan says F32 \(\)"),
        ("s", torch.tensor(0.0, device="meta"), "s: a plain dense tensor is needed, Tensor on meta"),
        ("w", torch.zeros(2, 3, dtype=torch.bfloat16).to_sparse(), "w: a plain dense tensor is needed"),
        ("s", torch.tensor(0.0).as_subclass(Logical), "s: a plain dense tensor is needed, Logical"),
        ("a", TENSORS["a"], "a: bytes 0 to 3 were written before"),
    ],
)
def test_a_tensor_that_is_not_as_planned_is_refused(target, name, tensor, message):
    with open_sink(target, PLAN, {}) as sink:
        sink.write("a", TENSORS["a"])
        with pytest.raises(RequestError, match=message):
            sink.write(name, tensor)
        for other in ("w", "s"):  # the refusal did no harm
            sink.write(other, TENSORS[other])
        sink.commit()


def test_chunks_stay_inside_their_tensor_and_are_written_once(target):
    with open_sink(target, PLAN, {}) as sink:
        sink.write_chunk("w", 4, bytes(4))
        for offset, size, message in (
            (-1, 1, "-1 to 0 were to be"),
            (11, 2, "11 to 13 .* the plan gives it 12"),
            (0, 5, "0 to 5 were written before"),
            (7, 2, "7 to 9 were written before"),
        ):
            with pytest.raises(RequestError, match=f"w: bytes {message}"):
                sink.write_chunk("w", offset, bytes(size))
        sink.write_chunk("w", 8, bytes(4))
        sink.write("a", TENSORS["a"])
        with pytest.raises(OutputError, match="2 of 4 tensors were not, or not completely, written: w, s. Write"):
            sink.commit()
        sink.write_chunk("w", 0, bytes(4))
        sink.write("s", TENSORS["s"])
        sink.commit()
    assert safetensors.torch.load_file(target)["w"].equal(torch.zeros(2, 3, dtype=torch.bfloat16))


def test_a_copy_is_compared_with_what_was_read_and_may_get_another_name(target, tmp_path):
    data = torch.arange(5 * 2**20, dtype=torch.int32)  # more than one chunk
    safetensors.torch.save_file({"t": data, "none": torch.zeros(0)}, tmp_path / "s.safetensors")
    plan = [OutputTensor("new", "U8", (20 * 2**20,)), OutputTensor("none", "F32", (0,))]

    def write(damage: int | None) -> None:
        with open_source(tmp_path / "s.safetensors") as src, open_sink(target, plan, {}) as sink:
            sink.copy(src, "t", "new")
            sink.copy(src, "none")
            if damage is not None:
                with open(sink.part, "r+b") as file:
                    file.seek(damage, os.SEEK_END)
                    file.write(b"\xff")
            sink.commit()

    for damage in (-1, -7 * 2**20, -20 * 2**20):
        with pytest.raises(VerificationError, match=r"new: reads back differently from .*s\.safetensors"):
            write(damage)
        assert [path.name for path in target.parent.iterdir() if path != tmp_path / "s.safetensors"] == []
    write(None)
    assert safetensors.torch.load_file(target)["new"].view(torch.int32).equal(data)


BAD_PLANS = {
    "doubled": ([PLAN[0], PLAN[0]], {}, "two entries named 'a'"),
    "reserved": ([OutputTensor("__metadata__", "U8", (1,))], {}, "no tensor can be named __metadata__"),
    "dtype": ([OutputTensor("a", "F33", (1,))], {}, "a: unknown dtype 'F33'"),
    "shape": ([OutputTensor("a", "U8", (-1,))], {}, r"a: shape \(-1,\) must be"),
    "bits": ([OutputTensor("a", "F6_E3M2", (3,))], {}, "a: .* not a whole number of bytes"),
    "surrogate": ([OutputTensor("\ud800", "U8", (1,))], {}, "not valid Unicode"),
    "metadata": (PLAN, {"steps": 5}, "metadata 'steps': 5; safetensors holds strings only"),
    "too long": (PLAN, {"x": "y" * MAX_HEADER_BYTES}, "the header would take 1000"),
}


@pytest.mark.parametrize(("entries", "metadata", "message"), BAD_PLANS.values(), ids=BAD_PLANS.keys())
def test_what_no_safetensors_file_can_hold_is_refused_before_anything_is_written(target, entries, metadata, message):
    with pytest.raises(RequestError, match=message):
        open_sink(target, entries, metadata)
    assert list(target.parent.iterdir()) == []
