"""Reading whole checkpoints: single files, shards, folders; from many threads; and noticing that a file changed."""

import io
import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from comfyui_quantpress.quant_core.checkpoint import source as source_module
from comfyui_quantpress.quant_core.checkpoint.metadata import HEADER_KEY, build_header_metadata
from comfyui_quantpress.quant_core.checkpoint.source import Source, open_source
from comfyui_quantpress.quant_core.errors import InputFileError, RequestError


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], **index: object) -> Path:
    """Shards as the library writes them, and their index; `index` overrides weight_map."""
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map, **index}))
    return path


TWO_SHARDS = {
    "m-00001-of-00002.safetensors": {"b": torch.arange(4.0), "a": torch.ones(2, 2)},
    "m-00002-of-00002.safetensors": {"c": torch.zeros(3, dtype=torch.int8)},
}


def test_a_path_that_cannot_be_opened_is_an_input_error(tmp_path):
    with pytest.raises(InputFileError, match="No such file"):
        open_source(tmp_path / "absent.safetensors")
    with pytest.raises(InputFileError, match="null"):
        open_source("a\0b.safetensors")
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InputFileError, match="not a regular file"):
        open_source(tmp_path / "pipe.safetensors")


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    tensors = {f"layer.{i}": torch.randint(0, 256, (1000 + i,), dtype=torch.uint8) for i in range(40)}
    safetensors.torch.save_file({**tensors, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}, path)
    return path


class YieldingFile(io.FileIO):
    """Gives other threads their turn between seek and read."""

    def seek(self, *where: int) -> int:
        position = super().seek(*where)
        time.sleep(1e-5)
        return position


@pytest.mark.parametrize("have_preadv", [True, False])
def test_reads_from_many_threads_do_not_mix(model, monkeypatch, have_preadv):
    if have_preadv and not source_module.HAVE_PREADV:
        pytest.skip("this system has no os.preadv")
    monkeypatch.setattr(source_module, "HAVE_PREADV", have_preadv)
    if not have_preadv:
        monkeypatch.delattr(os, "preadv", raising=False)
        monkeypatch.setattr(source_module, "open", YieldingFile, raising=False)
    monkeypatch.setattr(source_module, "MAX_READ_BYTES", 100)  # many short reads, which would interleave
    expected = safetensors.torch.load_file(model)
    wanted = random.Random(0).choices(list(expected), k=60)
    with open_source(model) as src, ThreadPoolExecutor(8) as pool:
        read = list(pool.map(src.read, wanted))
    assert all(tensor.equal(expected[name]) for name, tensor in zip(wanted, read, strict=True))


def test_what_is_read_is_writable_and_independent_of_the_file(model):
    with open_source(model) as src:
        first = src.read("layer.3")
        first.zero_()
        assert not src.read("layer.3").equal(first)
        assert first.untyped_storage().nbytes() == src.tensors["layer.3"].nbytes
        src.check_unchanged()
    with pytest.raises(ValueError, match="closed"):
        src.read("layer.3")


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1003, 5000])
def test_chunks_join_to_the_stored_bytes(model, chunk_bytes):
    with open_source(model) as src:
        chunks = list(src.copy_chunks("layer.3", chunk_bytes))
        assert b"".join(chunks) == src.read_bytes("layer.3").numpy().tobytes()
        assert max(map(len, chunks)) == min(chunk_bytes, 1003)
        assert list(src.copy_chunks("none")) == []
        with pytest.raises(RequestError, match="chunk_bytes is 0"):
            src.copy_chunks("layer.3", 0)
        for read in (src.read, src.read_bytes, src.copy_chunks):
            with pytest.raises(RequestError, match="no tensor 'layer.99'"):
                read("layer.99")


def test_the_identity_hash_tells_files_apart_by_their_edges(tmp_path):
    def identity(path: Path) -> str:
        with open_source(path) as src:
            return src.identity_hash()

    big = torch.zeros(3 * 2**20, dtype=torch.uint8)
    variants = {"same": {}, "again": {}, "first": {0: 1}, "middle": {2**20 + 2**19: 1}, "last": {-1: 1}}
    found = {}
    for name, changes in variants.items():
        tensor = big.clone()
        for at, value in changes.items():
            tensor[at] = value
        safetensors.torch.save_file({"t": tensor}, tmp_path / f"{name}.safetensors")
        found[name] = identity(tmp_path / f"{name}.safetensors")
    assert found["same"] == found["again"]
    assert found["middle"] == found["same"]  # as documented: identity is not a proof of integrity
    assert len(set(found.values())) == 3


def test_a_change_while_open_is_noticed(model):
    def rewrite() -> None:
        os.utime(model, ns=(0, 0))

    def replace() -> None:
        stat = model.stat()
        copy = model.with_name("copy")
        copy.write_bytes(model.read_bytes())
        os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(copy, model)

    for change in (rewrite, replace):
        with open_source(model) as src:
            change()
            with pytest.raises(InputFileError, match="changed while it was being read"):
                src.check_unchanged()
    with open_source(model) as src:
        os.truncate(model, 5000)
        with pytest.raises(InputFileError, match="bytes too early"):
            list(map(src.read, src.tensors))
        model.unlink()
        with pytest.raises(InputFileError, match="No such file"):
            src.check_unchanged()


def test_a_read_error_of_the_disk_is_an_input_error(model, monkeypatch):
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with open_source(model) as src:
        monkeypatch.setattr(source_module, "HAVE_PREADV", True)
        monkeypatch.setattr(os, "preadv", fail, raising=False)
        with pytest.raises(InputFileError, match="model.safetensors: .*Input/output error"):
            src.read("scalar")


@pytest.mark.parametrize("through", ["index", "folder"])
def test_shards_read_as_one_source(tmp_path, through):
    index = write_shards(tmp_path, TWO_SHARDS)
    with open_source(index if through == "index" else tmp_path) as src:
        assert src.path == index
        assert src.files == tuple(tmp_path / name for name in TWO_SHARDS)
        assert list(src.tensors) == ["a", "b", "c"]  # as the library orders them within a file
        assert src.nbytes == 35
        for tensors in TWO_SHARDS.values():
            for name, tensor in tensors.items():
                assert src.read(name).equal(tensor)
        index.write_text("{}")
        with pytest.raises(InputFileError, match="index.json: .* changed"):
            src.check_unchanged()


def test_metadata_of_shards_is_merged(tmp_path):
    index = write_shards(tmp_path, TWO_SHARDS)

    def open_with(*metadata: dict[str, str]) -> Source:
        for (name, tensors), own in zip(TWO_SHARDS.items(), metadata, strict=True):
            safetensors.torch.save_file(tensors, tmp_path / name, own)
        return open_source(index)

    one, two = {"a": {"format": "nvfp4"}}, {"c": {"format": "mxfp8"}}
    with open_with(
        {"format": "pt", HEADER_KEY: build_header_metadata(one)},
        {"format": "x", "more": "1", HEADER_KEY: build_header_metadata(two)},
    ) as src:
        assert src.metadata == {"format": "pt", "more": "1", HEADER_KEY: build_header_metadata({**one, **two})}
    with pytest.raises(InputFileError, match="a: two shards describe it differently"):
        open_with({HEADER_KEY: build_header_metadata(one)}, {HEADER_KEY: build_header_metadata({"a": two["c"]})})


def test_an_index_that_disagrees_with_its_shards_names_the_tensors(tmp_path):
    first, second = TWO_SHARDS
    whole = {"a": first, "b": first, "c": second}
    for weight_map, message in (
        ({**whole, "ghost": second}, f"'ghost' should be in {second} and is not"),
        ({**whole, "c": first}, "shards disagree: 'c' should be in"),
        ({"a": first, "c": second}, f"'b' in {first} is not in the index"),
    ):
        with pytest.raises(InputFileError, match=message):
            open_source(write_shards(tmp_path, TWO_SHARDS, weight_map=weight_map))
    doubled = {**TWO_SHARDS, second: {"c": torch.ones(1), "a": torch.ones(1)}}
    with pytest.raises(InputFileError, match=f"'a' is a duplicate, in {first} and {second}"):
        open_source(write_shards(tmp_path, doubled))
    (tmp_path / second).unlink()
    with pytest.raises(InputFileError, match=f"1 of 2 shards are missing: {second}"):
        open_source(tmp_path / "model.safetensors.index.json")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"c": second}}))
    with pytest.raises(InputFileError, match=f"1 of 1 shard is missing: {second}"):
        open_source(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize(
    "name",
    [
        "../m.safetensors",
        "/m.safetensors",
        "sub/m.safetensors",
        "..\\m.safetensors",
        "C:m.safetensors",
        "m.bin",
        "..",
        "",
        "m\0.safetensors",
        5,
        None,
    ],
)
def test_an_index_never_leads_out_of_its_folder(tmp_path, name):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for place in ("m.safetensors", "in/sub/m.safetensors"):
        safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / place)
    with pytest.raises(InputFileError, match="tensor 'a' is said to be in .* in the index's own folder"):
        open_source(write_shards(tmp_path / "in", {}, weight_map={"a": name}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "is a JSON list"),
        ("{}", "weight_map is None"),
        ('{"weight_map": {}}', "weight_map is {}"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' more than once"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, text, message):
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(InputFileError, match=message):
        open_source(path)


def test_a_folder_must_hold_exactly_one_candidate(tmp_path):
    with pytest.raises(InputFileError, match="no .safetensors file and no index"):
        open_source(tmp_path)
    for name in ("one.safetensors", "._one.safetensors"):  # macOS leaves the second on foreign disks
        safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / name)
    with open_source(tmp_path) as src:
        assert src.path == tmp_path / "one.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(InputFileError, match=r"2 candidates \(one.safetensors, two.safetensors\)"):
        open_source(tmp_path)


def test_an_opening_that_fails_leaves_no_file_open(tmp_path):
    index = write_shards(tmp_path, TWO_SHARDS)
    (tmp_path / list(TWO_SHARDS)[1]).write_bytes(b"damaged")
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc in which to count open files")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(InputFileError):
            open_source(index)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["M.SAFETENSORS", "m.SafeTensors", "m.sft"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path, name):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / name)
    paths = [tmp_path / name] if name.endswith("sft") else [tmp_path / name, tmp_path]
    for path in paths:
        with open_source(path) as source:
            assert source.path == tmp_path / name and list(source.tensors) == ["a"]


def test_an_index_and_its_shards_may_end_in_capitals(tmp_path):
    shards = {name.upper(): tensors for name, tensors in TWO_SHARDS.items()}
    index = write_shards(tmp_path, shards)
    upper = index.rename(index.with_name(index.name.upper()))
    for path in (upper, tmp_path):
        with open_source(path) as source:
            assert sorted(source.tensors) == ["a", "b", "c"]


@pytest.mark.parametrize("main", ["transformer", "unet"])
@pytest.mark.parametrize("at_the_root", [(), ("a.safetensors", "b.safetensors")])
def test_a_diffusers_root_names_the_folder_of_its_diffusion_model(tmp_path, main, at_the_root):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "scheduler").mkdir()
    for folder in (main, "vae"):
        (tmp_path / folder).mkdir()
        safetensors.torch.save_file({folder: torch.ones(2)}, tmp_path / folder / "model.safetensors")
    for name in at_the_root:
        safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / name)
    with pytest.raises(InputFileError, match=f"diffusion model in {main}/, beside vae/") as caught:
        open_source(tmp_path)
    assert str(caught.value).endswith(f"Give {tmp_path / main}.")
    with open_source(tmp_path / main) as source:
        assert list(source.tensors) == [main]
