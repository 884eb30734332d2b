"""What a user sees when something is wrong: one message, exit code 1, the input untouched, nothing left behind."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from comfyui_quantpress.cli.main import main
from comfyui_quantpress.quant_core.checkpoint.sink import Sink
from comfyui_quantpress.quant_core.formats import all_formats
from comfyui_quantpress.quant_core.pipeline import feed as feed_module
from comfyui_quantpress.quant_core.pipeline import run as run_module
from safetensors.torch import load_file, save_file

FORMATS = [fmt.name for fmt in all_formats()]
SAME = "same file as the source"


@pytest.fixture(autouse=True)
def one_thread():
    """Weights this small lose time by being shared out, and on a busy machine a lot."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_tensors(count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tensors = {"img_in.weight": torch.randn(256, 64, generator=generator).bfloat16()}
    for index in range(count):
        tensors[f"blocks.{index}.attn.qkv.weight"] = torch.randn(256, 256, generator=generator).bfloat16()
        tensors[f"blocks.{index}.attn.qkv.bias"] = torch.randn(256, generator=generator).bfloat16()
    return tensors


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(model_tensors(), path)
    return path


def snapshot(folder: Path) -> dict[str, str]:
    """{relative path: sha256} of every file below the folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def messages(err: str) -> list[str]:
    assert "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith("quantpress: ")]


def assert_refused(capsys, folder: Path, args: list, *parts: str) -> str:
    """The command ends with 1 and one message that holds all parts (in any case), and changes no file."""
    before = snapshot(folder)
    assert main([str(arg) for arg in args]) == 1
    out, err = capsys.readouterr()
    (message,) = messages(err)
    assert message.startswith("quantpress: error: ")
    assert [part for part in parts if part.lower() not in err.lower()] == []
    assert out == ""
    assert snapshot(folder) == before
    return err


# --- files that are not safetensors files ---------------------------------------------------------------------------


def raw_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def header_of(**tensors: tuple[str, list[int], list[int]]) -> bytes:
    return json.dumps(
        {
            name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            for name, (dtype, shape, offsets) in tensors.items()
        }
    ).encode()


ONE = header_of(a=("F32", [2], [0, 8]))
BAD_FILES = {
    "empty": (b"", "empty"),
    "seven bytes": (b"1234567", "too short"),
    "truncated header": (raw_file(ONE)[:20], "header"),
    "truncated data": (raw_file(ONE, bytes(5)), "truncated"),
    "trailing data": (raw_file(ONE, bytes(9)), "trailing"),
    "header length beyond the file": (raw_file(ONE, bytes(8), length=5000), "5000"),
    "huge header length": (raw_file(ONE, bytes(8), length=2**62), str(2**62)),
    "header length 0": (raw_file(b"", bytes(8)), "header of 0 bytes"),
    "overlapping tensors": (
        raw_file(header_of(a=("F32", [2], [0, 8]), b=("F32", [2], [4, 12])), bytes(12)),
        "overlap",
    ),
    "a hole": (raw_file(header_of(a=("F32", [2], [0, 8]), b=("F32", [1], [12, 16])), bytes(16)), "hole"),
    "offsets out of range": (raw_file(header_of(a=("F32", [2], [100, 108])), bytes(8)), "'a'"),
    "offsets that do not fit the shape": (raw_file(header_of(a=("F32", [3], [0, 8])), bytes(8)), "size mismatch"),
    "invalid UTF-8": (raw_file(b'{"\xff":1}'), "UTF-8"),
    "invalid JSON": (raw_file(b'{"a":'), "JSON"),
    "JSON nested a million deep": (raw_file(b'{"a":' + b"[" * 10**6), "JSON"),
    "duplicate keys": (raw_file(ONE[:-1] + b"," + ONE[1:], bytes(8)), "more than once"),
    "unknown dtype": (raw_file(header_of(a=("F31", [2], [0, 8])), bytes(8)), "F31"),
    "a pickle": (pickle.dumps({"a": list(range(100))}), "pickle"),
    "a zip": (b"PK\x03\x04" + bytes(range(1, 200)), "zip"),
    "a web page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
}


def command_lines(path: Path, folder: Path) -> dict[str, list]:
    out = folder / "out.safetensors"
    return {
        "quantize": ["quantize", path, out, "--format", "int8_rowwise"],
        "dry run": ["quantize", path, out, "--format", "int8_rowwise", "--dry-run"],
        "dequantize": ["dequantize", path, out],
        "inspect": ["inspect", path],
        "verify": ["verify", path],
    }


@pytest.mark.parametrize("command", ["quantize", "dry run", "dequantize", "inspect", "verify"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_by_every_command(case, command, tmp_path, capsys):
    content, part = BAD_FILES[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    assert_refused(capsys, tmp_path, command_lines(path, tmp_path)[command], "bad.safetensors", part)


@pytest.mark.parametrize("command", ["quantize", "dry run", "dequantize", "inspect", "verify"])
def test_a_missing_file_is_refused_by_every_command(command, tmp_path, capsys):
    path = tmp_path / "nowhere.safetensors"
    assert_refused(capsys, tmp_path, command_lines(path, tmp_path)[command], "nowhere.safetensors", "No such file")


def test_a_real_torch_pickle_renamed_is_named_as_what_it_is(tmp_path, capsys):
    path = tmp_path / "bad.safetensors"
    torch.save(model_tensors(), path)
    assert_refused(capsys, tmp_path, command_lines(path, tmp_path)["quantize"], "zip archive", "safetensors first")


def test_an_index_with_a_missing_shard_names_the_shard(model, tmp_path, capsys):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    assert_refused(capsys, tmp_path, command_lines(index, tmp_path)["quantize"], "part-1.safetensors", "missing")


def test_a_model_without_linear_weights_is_refused(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    save_file({"norm.weight": torch.ones(8)}, path)
    assert_refused(capsys, tmp_path, command_lines(path, tmp_path)["quantize"], "no linear weight")


# --- requests that cannot be met -----------------------------------------------------------------------------------

REQUESTS = {
    "unknown format": (["--format", "int7"], ["int7", "int8_rowwise"]),
    "group size not offered": (["--format", "bnb_nf4", "--group-size", "48"], ["48", "32, 64, 128"]),
    "group size of a format without": (["--format", "int8_rowwise", "--group-size", "64"], ["has none"]),
    "rotation not offered": (["--format", "int8_convrot", "--rotation", "3"], ["3", "256"]),
    "unknown fallback": (["--format", "int8_rowwise", "--fallback", "int7"], ["int7"]),
    "unknown scales": (["--format", "int8_rowwise", "--scales", "magic"], ["magic", "absmax"]),
    "unknown rounding": (["--format", "int8_rowwise", "--rounding", "magic"], ["magic", "nearest"]),
    "unknown device": (["--format", "int8_rowwise", "--device", "abacus"], ["abacus"]),
    "regex that does not compile": (["--format", "int8_rowwise", "--keep", "attn("], ["attn(", "regular expression"]),
    "keep that matches nothing": (["--format", "int8_rowwise", "--keep", "atn"], ["atn", "none of the 4", "blocks."]),
    "only that matches nothing": (["--format", "int8_rowwise", "--only", "atn"], ["atn", "none of the 4"]),
    "two regexes wrong": (["--format", "int8_rowwise", "--keep", "(", "--only", "zz"], ["2 problems", "zz"]),
    "everything kept": (["--format", "int8_rowwise", "--keep", "."], ["none of the 4", "--only"]),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_that_cannot_be_met_is_refused(case, model, tmp_path, capsys):
    options, parts = REQUESTS[case]
    assert_refused(capsys, tmp_path, ["quantize", model, tmp_path / "out.safetensors", *options], *parts)


def test_a_missing_cuda_device_is_refused(model, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    args = ["quantize", model, tmp_path / "out.safetensors", "--format", "int8_rowwise", "--device", "cuda"]
    assert_refused(capsys, tmp_path, args, "--device cuda", "Choose cpu")


def test_shapes_that_a_format_cannot_take_are_named(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    save_file({"blocks.0.fc.weight": torch.randn(64, 1000)}, path)
    args = ["quantize", path, tmp_path / "out.safetensors", "--format", "int8_blockwise"]
    assert_refused(capsys, tmp_path, args, "int8_blockwise", "group_size 128")


# --- outputs that cannot be written --------------------------------------------------------------------------------


def outputs(source: Path) -> dict[str, tuple[Path, str]]:
    """{case: (target, part of the message)}; the folder of the source gets what the cases need."""
    folder = source.parent
    (folder / "taken.safetensors").write_bytes(b"precious")
    (folder / "folder.safetensors").mkdir()
    (folder / "link.safetensors").symlink_to(source)
    os.link(source, folder / "hardlink.safetensors")
    return {
        "the input": (source, SAME),
        "another spelling of the input": (folder / ".." / folder.name / source.name, SAME),
        "a symlink to the input": (folder / "link.safetensors", SAME),
        "a hard link to the input": (folder / "hardlink.safetensors", SAME),
        "an existing file": (folder / "taken.safetensors", "exists"),
        "a folder": (folder / "folder.safetensors", "directory"),
        "in a missing folder": (folder / "no" / "out.safetensors", "missing"),
        "another suffix": (folder / "out.pt", ".safetensors"),
    }


OUTPUTS = [
    "the input",
    "another spelling of the input",
    "a symlink to the input",
    "a hard link to the input",
    "an existing file",
    "a folder",
    "in a missing folder",
    "another suffix",
]


@pytest.mark.parametrize("command", ["quantize", "dequantize"])
@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused(case, command, model, quantized, capsys):
    source = model if command == "quantize" else quantized
    target, part = outputs(source)[case]
    more = ["--format", "int8_rowwise"] if command == "quantize" else []
    overwrite = ["--overwrite"] if "the input" in case else []
    assert_refused(capsys, source.parent, [command, source, target, *more, *overwrite], target.name, part)


@pytest.fixture
def quantized(tmp_path) -> Path:
    folder = tmp_path / "quantized"
    folder.mkdir()
    save_file(model_tensors(), folder / "model.safetensors")
    assert (
        main(
            ["quantize", str(folder / "model.safetensors"), str(folder / "q.safetensors"), "--format", "int8_rowwise"]
        )
        == 0
    )
    return folder / "q.safetensors"


def test_a_read_only_folder_is_refused(model, tmp_path, capsys):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user (root) may write into read-only folders; the next test simulates it")
    assert_refused(
        capsys, tmp_path, ["quantize", model, folder / "out.safetensors", "--format", "int8_rowwise"], "permission"
    )


def test_a_folder_that_the_system_refuses_to_write_is_refused(model, tmp_path, capsys, monkeypatch):
    real = os.open

    def refuse(path, flags, *more, **named):
        if str(path).endswith(".part"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    args = ["quantize", model, tmp_path / "out.safetensors", "--format", "int8_rowwise"]
    assert_refused(capsys, tmp_path, args, "Permission denied", "another folder")


def test_a_full_disk_is_found_before_anything_is_read(model, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(feed_module, "read_weight", lambda *args: pytest.fail("a weight was read"))
    args = ["quantize", model, tmp_path / "out.safetensors", "--format", "int8_rowwise"]
    assert_refused(capsys, tmp_path, args, "disk space", "Free some")


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(model, tmp_path, capsys, monkeypatch):
    from comfyui_quantpress.quant_core.checkpoint import sink

    real, calls = sink.write_at, []

    def fill_up(*args):
        calls.append(args)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(sink, "write_at", fill_up)
    args = ["quantize", model, tmp_path / "out.safetensors", "--format", "int8_rowwise"]
    assert_refused(capsys, tmp_path, args, "No space left")


REPORTS = {
    "the input": ("model.safetensors", "input"),
    "the output": ("out.safetensors", "output"),
    "an existing file": ("taken.json", "exists"),
    "in a missing folder": ("no/report.json", "missing"),
    "a folder": ("folder", "folder"),
}


@pytest.mark.parametrize("case", REPORTS)
def test_a_report_path_is_checked_before_the_conversion(case, model, tmp_path, capsys, monkeypatch):
    (tmp_path / "taken.json").write_text("precious")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(feed_module, "read_weight", lambda *args: pytest.fail("a weight was read"))
    name, part = REPORTS[case]
    args = ["quantize", model, tmp_path / "out.safetensors", "--format", "int8_rowwise", "--report", tmp_path / name]
    assert_refused(capsys, tmp_path, args, "--report", part)


# --- NaN and Inf ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nonfinite(tmp_path) -> Path:
    tensors = model_tensors()
    tensors["blocks.1.attn.qkv.weight"][3, :4] = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0])
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("fmt", FORMATS)
def test_nan_and_inf_in_a_weight_are_named_and_counted(fmt, nonfinite, tmp_path, capsys):
    args = ["quantize", nonfinite, tmp_path / "out.safetensors", "--format", fmt]
    assert_refused(capsys, tmp_path, args, "blocks.1.attn.qkv.weight", "3 of 65536", "--allow-nonfinite")


def test_allow_nonfinite_keeps_exactly_that_layer_as_it_is(nonfinite, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    assert (
        main(["quantize", str(nonfinite), str(target), "--format", "int8_rowwise", "--allow-nonfinite", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    kept = {row["layer"]: row["reason"] for row in report["layers"] if row["format"] is None}
    assert "3 values are NaN or Inf" in kept["blocks.1.attn.qkv"]
    assert any("blocks.1.attn.qkv" in warning for warning in report["warnings"])
    written, source = load_file(target), load_file(nonfinite)
    name = "blocks.1.attn.qkv.weight"
    assert torch.equal(written[name].view(torch.int16), source[name].view(torch.int16))
    assert {n for n, t in written.items() if t.dtype == torch.int8} == {f"blocks.{i}.attn.qkv.weight" for i in (0, 2)}


# --- weights at the edges ------------------------------------------------------------------------------------------


def odd_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    huge = torch.randn(256, 256, generator=generator)
    huge[5, 7], huge[100, 200] = 3e38, -3e38
    return {
        "blocks.0.plain.weight": torch.randn(256, 256, generator=generator),
        "blocks.1.zero.weight": torch.zeros(256, 256),
        "blocks.2.subnormal.weight": torch.randn(256, 256, generator=generator) * 1e-40,
        "blocks.3.huge.weight": huge,
        "blocks.4.one_row.weight": torch.randn(1, 256, generator=generator),
        "blocks.5.one_column.weight": torch.randn(256, 1, generator=generator),
        "blocks.6.odd.weight": torch.randn(129, 257, generator=generator),
        "blocks.7.small.weight": torch.randn(3, 5, generator=generator),
    }


@pytest.mark.parametrize("fmt", FORMATS)
def test_odd_weights_go_through_every_format_without_nan(fmt, tmp_path, capsys):
    source, target, back = (tmp_path / f"{name}.safetensors" for name in ("model", "out", "back"))
    save_file(odd_weights(), source)
    assert main(["quantize", str(source), str(target), "--format", fmt, "--json"]) == 0
    layers = {row["layer"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    assert layers["blocks.0.plain"]["format"] == layers["blocks.3.huge"]["format"] == fmt
    assert [name for name, row in layers.items() if row["format"] is None and not row["reason"]] == []
    assert main(["verify", str(target), "--against", str(source)]) == 0
    assert main(["dequantize", str(target), str(back), "--dtype", "fp32"]) == 0
    decoded = load_file(back)
    assert {name: tuple(w.shape) for name, w in decoded.items()} == {
        n: tuple(w.shape) for n, w in odd_weights().items()
    }
    assert [name for name, w in decoded.items() if not torch.isfinite(w).all()] == []
    assert decoded["blocks.1.zero.weight"].abs().max() < 1e-30  # awq_w4a16: 1e-30 steps around zero


# --- interrupts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hooked(monkeypatch):
    """Calls a function when the conversion reaches a moment."""

    def hook(moment: str, action) -> None:
        owner = {"copy": Sink, "read_weight": feed_module}.get(moment, run_module)
        real = getattr(owner, moment)

        def hooked_function(*args, **named):
            action()
            return real(*args, **named)

        monkeypatch.setattr(owner, moment, hooked_function)

    return hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["read_weight", "make_plan", "open_sink", "quantize_layer", "_write", "copy"])
def test_a_signal_at_any_moment_leaves_nothing(moment, number, hooked, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("comfyui_quantpress.quant_core.cancel._ASK_EVERY_S", 0.0)
    hooked(moment, lambda: signal.raise_signal(number))
    before, handlers = snapshot(tmp_path), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    code = main(["quantize", str(model), str(tmp_path / "out.safetensors"), "--format", "bnb_nf4"])
    err = capsys.readouterr().err
    assert code == 130
    assert "interrupted" in messages(err)[-1]
    assert snapshot(tmp_path) == before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_during_the_last_check_leaves_a_complete_file_or_none(hooked, model, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    hooked("check_file", lambda: signal.raise_signal(signal.SIGINT))
    code = main(["quantize", str(model), str(target), "--format", "bnb_nf4"])
    assert (code, target.exists()) in ((0, True), (130, False))
    if target.exists():
        assert main(["verify", str(target), "--against", str(model)]) == 0
    assert not list(tmp_path.glob(".*.part"))


# In a process of its own: quantizing is slowed down, so that the signal surely arrives in the middle.
SLOW = """
import sys, time
from comfyui_quantpress.quant_core.pipeline import run
real = run.quantize_layer
def slow(*args, **named):
    time.sleep(0.1)
    return real(*args, **named)
run.quantize_layer = slow
from comfyui_quantpress.cli.main import main
sys.exit(main())
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_stopped_in_the_middle_leaves_no_output(number, tmp_path, capsys):
    source, target = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(model_tensors(30), source)
    before = snapshot(tmp_path)
    args = [sys.executable, "-c", SLOW, "quantize", source, target, "--format", "int8_rowwise", "--device", "cpu"]
    process = subprocess.Popen(
        list(map(str, args)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.safetensors.*.part")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(number)
        signalled = time.monotonic()
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    parts = list(tmp_path.glob(".*.part"))
    assert not target.exists() and out == ""
    assert {name: digest for name, digest in snapshot(tmp_path).items() if not name.endswith(".part")} == before
    if number == signal.SIGINT:
        assert process.returncode == 130 and parts == []
        assert time.monotonic() - signalled < 5
        assert "interrupted" in messages(err)[-1]
        return
    assert process.returncode == -9 and len(parts) == 1
    os.utime(parts[0], (time.time() - 7200,) * 2)  # the next run takes it for dead once it is an hour old
    assert main(["quantize", str(source), str(target), "--format", "int8_rowwise"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "out.safetensors"]
