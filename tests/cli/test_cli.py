"""The commands on good input: what they print, their JSON, their exit codes."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from comfyui_quantpress.cli.main import COMMANDS, build_parser, main
from comfyui_quantpress.cli.shared.console import duration_text, json_text, size_text, table_lines, time_text
from comfyui_quantpress.cli.shared.groups import collapse
from comfyui_quantpress.cli.shared.progress import PlainLines, show_progress
from comfyui_quantpress.quant_core.formats import all_formats
from comfyui_quantpress.quant_core.pipeline.model_rules import UNKNOWN
from comfyui_quantpress.quant_core.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FORMATS = [fmt.name for fmt in all_formats()]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "img_in.weight": torch.randn(256, 64, generator=generator).bfloat16(),
        "norm.weight": torch.ones(256),
        "step": torch.tensor(7),
    }
    for index in range(3):
        tensors[f"blocks.{index}.attn.qkv.weight"] = torch.randn(512, 256, generator=generator).bfloat16()
        tensors[f"blocks.{index}.attn.qkv.bias"] = torch.randn(512, generator=generator).bfloat16()
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "author": "somebody"})
    return path


@pytest.fixture(scope="module")
def quantized(model) -> Path:
    path = model.with_name("quantized.safetensors")
    assert main(["quantize", str(model), str(path), "--format", "int8_rowwise"]) == 0
    return path


def run_json(capsys, *args) -> dict:
    """The command's stdout as JSON: nothing else may stand there."""
    code = main([*map(str, args), "--json"])
    out = capsys.readouterr().out
    assert code == 0
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def usage_error(args: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(args)
    return caught.value.code


# --- the command itself --------------------------------------------------------------------------------------------


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom comfyui_quantpress.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n"
        "    print(sorted({'torch', 'numpy', 'rich', 'safetensors', 'PIL'} & sys.modules.keys()), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        seconds.append(time.monotonic() - began)
        assert done.stderr.strip() == "[]"
        assert "quantize" in done.stdout
    assert min(seconds) < 0.5


def test_every_module_with_a_command_is_offered():
    text = build_parser().format_help()
    assert [
        command.__name__.rpartition(".")[2] for command in COMMANDS if command.__name__.rpartition(".")[2] not in text
    ] == []


def test_version_is_the_packages(capsys):
    assert usage_error(["--version"]) == 0
    from comfyui_quantpress.quant_core._version import __version__

    assert capsys.readouterr().out == f"quantpress {__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["press"],
        ["quantize"],
        ["quantize", "a", "b"],
        ["inspect"],
        ["verify", "a", "--worst"],
        ["dequantize", "a", "b", "--dtype", "int8"],
        ["quantize", "a", "b", "--format", "x", "--seed", "many"],
        ["quantize", "a", "b", "--format", "x", "--dry-run", "--report", "r.json"],
    ],
)
def test_wrong_usage_exits_with_2(args, capsys):
    assert usage_error(args) == 2
    assert "usage: quantpress" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "comfyui_quantpress.cli.main", "formats"],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


# --- quantize ------------------------------------------------------------------------------------------------------


def test_quantize_writes_a_verified_file_and_says_what_it_did(model, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    assert main(["quantize", str(model), str(target), "--format", "int8_rowwise"]) == 0
    out, err = capsys.readouterr()
    assert "3 layers quantized to int8_rowwise, 1 kept" in out
    assert err == f"quantpress: warning: {UNKNOWN}\n"
    with safe_open(target, "pt") as file:
        assert file.metadata()["author"] == "somebody"
    written, source = load_file(target), load_file(model)
    for name in ("img_in.weight", "norm.weight", "step", "blocks.1.attn.qkv.bias"):
        assert torch.equal(written[name], source[name])


def test_the_report_file_equals_the_json_output(model, tmp_path, capsys):
    report = tmp_path / "report.json"
    printed = run_json(
        capsys, "quantize", model, tmp_path / "out.safetensors", "--format", "nvfp4", "--report", report
    )
    assert json.loads(report.read_text()) == printed
    assert printed["layers_quantized"] == 3 and printed["layers_kept"] == 1
    assert printed["output_bytes"] < printed["source_bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "report.json"]


def test_overwrite_replaces_output_and_report(model, tmp_path, capsys):
    target, report = tmp_path / "out.safetensors", tmp_path / "report.json"
    target.write_bytes(b"old")
    report.write_text("old")
    args = ["quantize", str(model), str(target), "--format", "int8_rowwise", "--report", str(report), "--overwrite"]
    assert main(args) == 0
    assert json.loads(report.read_text())["target"] == str(target)
    assert main(["verify", str(target), "--against", str(model)]) == 0


def test_options_reach_the_recipe(model, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    report = run_json(
        capsys,
        "quantize",
        model,
        target,
        "--format",
        "bnb_nf4",
        "--group-size",
        "32",
        "--seed",
        "5",
        "--keep",
        r"blocks\.2",
        "--only",
        "attn",
        "--only",
        "img_in",
        "--device",
        "cpu",
    )
    assert report["recipe"] == {
        "format": "bnb_nf4",
        "group_size": 32,
        "rounding": "nearest",
        "scales": "absmax",
        "seed": 5,
    }
    assert {row["layer"]: row["format"] for row in report["layers"]} == {
        "img_in": "bnb_nf4",
        "blocks.0.attn.qkv": "bnb_nf4",
        "blocks.1.attn.qkv": "bnb_nf4",
        "blocks.2.attn.qkv": None,
    }


def test_the_fallback_takes_what_the_format_cannot(model, tmp_path, capsys):
    report = run_json(
        capsys,
        "quantize",
        model,
        tmp_path / "out.safetensors",
        "--format",
        "int8_blockwise",
        "--group-size",
        "128",
        "--only",
        "img_in",
        "--only",
        "blocks",
        "--fallback",
        "int8_rowwise",
    )
    assert {row["layer"]: row["format"] for row in report["layers"]}["img_in"] == "int8_rowwise"


def test_the_same_request_gives_the_same_bytes(model, quantized, tmp_path):
    target = tmp_path / "again.safetensors"
    assert main(["quantize", str(model), str(target), "--format", "int8_rowwise"]) == 0
    assert target.read_bytes() == quantized.read_bytes()


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_dry_run_predicts_the_file_and_writes_nothing(fmt, model, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    plan = run_json(capsys, "quantize", model, target, "--format", fmt, "--dry-run")
    assert list(tmp_path.iterdir()) == [] and plan["target_exists"] is False
    report = run_json(capsys, "quantize", model, target, "--format", fmt)
    for key in ("recipe", "source_bytes", "output_bytes", "peak_bytes_estimate", "layers_quantized", "layers_kept"):
        assert plan[key] == report[key]
    assert sum(tensor.nbytes for tensor in load_file(target).values()) == plan["output_bytes"]
    assert [(g["layers"], g["count"], g["format"]) for g in plan["groups"] if g["format"]] == [
        ("blocks.{0..2}.attn.qkv", 3, fmt)
    ]


def test_a_dry_run_says_why_layers_are_kept_and_that_the_output_exists(model, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"precious")
    assert main(["quantize", str(model), str(target), "--format", "int8_rowwise", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "blocks.{0..2}.attn.qkv" in out and "BF16 -> int8_rowwise" in out
    assert "input layer" in out and "peak memory" in out and "exists" in out
    assert target.read_bytes() == b"precious"


# --- inspect, verify, formats --------------------------------------------------------------------------------------


def test_inspect_shows_groups_recipe_and_no_findings(quantized, capsys):
    content = run_json(capsys, "inspect", quantized)
    assert content["quantized_layers"] == 3 and content["findings"] == []
    assert {g["layers"]: (g["count"], g["format"]) for g in content["groups"]} == {
        "blocks.{0..2}.attn.qkv": (3, "int8_rowwise"),
        "img_in": (1, "BF16"),
    }
    assert content["recipe"]["recipe"]["format"] == "int8_rowwise"
    other = {row["dtype"]: row["count"] for row in content["other"]}
    assert other == {"BF16": 3, "F32": 1, "I64": 1}
    assert sum(row["bytes"] for row in content["groups"] + content["other"]) == content["bytes"]


def test_inspect_reads_no_weight(quantized, capsys, monkeypatch):
    from comfyui_quantpress.quant_core.checkpoint.source import Source

    real = Source.read_bytes
    monkeypatch.setattr(
        Source, "read_bytes", lambda self, name: pytest.fail(name) if name.endswith(".weight") else real(self, name)
    )
    assert main(["inspect", str(quantized)]) == 0


def test_inspect_describes_a_file_whose_metadata_is_damaged(quantized, tmp_path, capsys):
    tensors = load_file(quantized)
    del tensors["blocks.1.attn.qkv.weight_scale"]
    save_file(tensors, tmp_path / "bad.safetensors")
    content = run_json(capsys, "inspect", tmp_path / "bad.safetensors")
    (undecodable,) = [finding for finding in content["findings"] if finding["code"] == "undecodable"]
    assert "blocks.1.attn.qkv" in undecodable["message"]
    assert any(group["format"] == "I8" for group in content["groups"])


def test_inspect_reads_shards(model, tmp_path, capsys):
    tensors = load_file(model)
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for index, (name, tensor) in enumerate(tensors.items()):
        shards[("a.safetensors", "b.safetensors")[index % 2]][name] = tensor
    for file, content in shards.items():
        save_file(content, tmp_path / file)
    weight_map = {name: file for file, content in shards.items() for name in content}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    content = run_json(capsys, "inspect", tmp_path)
    assert content["files"] == ["a.safetensors", "b.safetensors"] and content["tensors"] == len(tensors)


def test_verify_measures_against_the_source(model, quantized, capsys):
    content = run_json(capsys, "verify", quantized, "--against", model)
    assert content["ok"] is True and len(content["layers"]) == 3
    assert all(0 < layer["relative_error"] < 0.02 and layer["snr_db"] > 35 for layer in content["layers"])


def test_verify_exits_with_1_on_errors_and_prints_them(model, quantized, tmp_path, capsys):
    tensors = load_file(quantized)
    tensors["blocks.1.attn.qkv.weight_scale"][3] = float("nan")
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad)
    assert main(["verify", str(bad)]) == 1
    out, err = capsys.readouterr()
    assert "blocks.1.attn.qkv.weight_scale" in out and err.startswith("quantpress: error: ")
    assert main(["verify", str(bad), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_verify_tells_another_model(quantized, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    save_file({"blocks.0.attn.qkv.weight": torch.randn(512, 256)}, other)
    assert main(["verify", str(quantized), "--against", str(other)]) == 1


def test_formats_lists_the_registry(capsys):
    rows = run_json(capsys, "formats")["formats"]
    assert [row["name"] for row in rows] == FORMATS
    assert {row["native_since"] is None for row in rows} == {True, False}
    assert main(["formats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(FORMATS)]] == FORMATS


# --- the small parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ([], []),
        (["a"], [("a", 1)]),
        (["b.0.x", "b.1.x", "b.2.x"], [("b.{0..2}.x", 3)]),
        (["b.0.x", "b.2.x", "b.3.x", "b.7.x"], [("b.{0,2..3,7}.x", 4)]),
        (["b.0.x.0", "b.0.x.2", "b.1.x.0", "b.1.x.2"], [("b.{0..1}.x.{0,2}", 4)]),
        (["b.0.x.0", "b.0.x.2", "b.1.x.0"], [("b.{0..1}.x.0", 2), ("b.0.x.2", 1)]),
        (["b.0.x", "c.0.x", "b.1.x"], [("b.{0..1}.x", 2), ("c.0.x", 1)]),
        (["block_0.x", "block_1.x"], [("block_0.x", 1), ("block_1.x", 1)]),
        (["b.00.x", "b.0.x"], [("b.00.x", 1), ("b.0.x", 1)]),
    ],
)
def test_collapse_stands_for_exactly_the_names(names, patterns):
    assert collapse(names) == patterns


def test_sizes_times_and_tables_read_well():
    assert [size_text(n) for n in (0, 999, 1000, 23_456_789, 8e9, 2.5e13)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "23.5 MB",
        "8.0 GB",
        "25.0 TB",
    ]
    assert [time_text(s) for s in (0.4, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
    assert [duration_text(s) for s in (0.44, 59.9, 59.96, 61)] == ["0.4 s", "59.9 s", "1:00", "1:01"]
    assert table_lines([("a", "1"), ("bb", "22")], ("n", "x"), right=(1,)) == ["n    x", "--  --", "a    1", "bb  22"]


def test_json_holds_no_nan_or_infinity():
    assert json.loads(json_text({"a": [float("nan"), 1.5], "b": {"c": float("-inf")}})) == {
        "a": [None, 1.5],
        "b": {"c": None},
    }


def lines_at(times_and_bytes: list[tuple[float, int]]) -> list[str]:
    stream, now = io.StringIO(), [0.0]
    lines = PlainLines("quantizing", stream, clock=lambda: now[0])
    for at, done in times_and_bytes:
        now[0] = at
        lines(Progress("x", 1, 2, done, 1000, at, 3.0))
    return stream.getvalue().splitlines()


def test_a_pipe_gets_at_most_one_line_a_second():
    assert len(lines_at([(i / 100, i) for i in range(1000)])) == 9
    assert lines_at([(0.5, 999)]) == []


def test_a_pipe_gets_a_line_per_five_percent_or_ten_seconds():
    assert lines_at([(2.0, 10), (3.0, 49), (4.0, 60)]) == ["quantizing:   6%, layer 1 of 2, 15 bytes/s, 0:03 left"]
    assert len(lines_at([(float(i), 10) for i in range(1, 31)])) == 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_throughput_and_time_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with show_progress("quantizing", stream) as show:
        show(Progress("x", 3, 9, 500, 1000, 2.0, 2.0))
        time.sleep(0.15)  # rich draws ten times a second
    text = stream.getvalue()
    assert all(part in text for part in ("quantizing", "50 %", "layer 3/9", "250 bytes/s", "0:02 left"))


def test_progress_does_not_reach_stdout(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("comfyui_quantpress.cli.shared.progress._LINE_EVERY_S", 0.0)
    assert main(["quantize", str(model), str(tmp_path / "out.safetensors"), "--format", "int8_rowwise", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["layers_quantized"] == 3
    assert "quantizing:" in err


def test_a_gpu_out_of_memory_is_explained(model, tmp_path, capsys, monkeypatch):
    def full(*args, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("comfyui_quantpress.quant_core.pipeline.run.quantize_layer", full)
    assert main(["quantize", str(model), str(tmp_path / "out.safetensors"), "--format", "int8_rowwise"]) == 1
    assert "--device cpu" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# --- demo ----------------------------------------------------------------------------------------------------------


def test_demo_prints_a_row_per_format_as_it_is_done(tmp_path, capsys, monkeypatch):
    from comfyui_quantpress.demo import run as demo_run
    from comfyui_quantpress.demo.results import FormatRow

    row = FormatRow(
        "nvfp4", "nvfp4.safetensors", 10_000_000, 4.5, 20.4, 19.9, 15.0, float("inf"), 0.5, 1.5, 29, 15, {}, "layout"
    )
    asked = {}

    def run_demo(out_dir, formats=None, progress=None):
        asked.update(out_dir=out_dir, formats=formats)
        progress(demo_run.DemoProgress("quantize", "nvfp4", 0, 1))
        progress(demo_run.DemoProgress("row", "nvfp4", 1, 1, row))
        return demo_run.DemoResult(
            (row,), out_dir / "s.png", out_dir / "r.csv", out_dir / "r.json", 18_000_000, 1.0, 3.0
        )

    monkeypatch.setattr(demo_run, "run_demo", run_demo)
    assert main(["demo", "--out", str(tmp_path), "--format", "nvfp4"]) == 0
    out, err = capsys.readouterr()
    assert asked == {"out_dir": tmp_path, "formats": ["nvfp4"]} and err == ""
    assert out.splitlines()[2].split() == [
        "nvfp4",
        "10.0",
        "MB",
        "4.50",
        "20.4",
        "dB",
        "19.9",
        "dB",
        "inf",
        "dB",
        "0.5",
        "s",
        "1.5",
        "s",
    ]
    assert str(tmp_path / "s.png") in out


def test_demo_of_an_unknown_format_is_refused(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "x"), "--format", "int7"]) == 1
    assert "int7" in capsys.readouterr().err and not (tmp_path / "x").exists()
