"""Every format's encoder gives the bytes of its golden file, and its decoder reads them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_quantpress.quant_core.formats import all_formats, get_format
from golden_corners import general_corners, variant
from golden_file import FOLDER, command, file_text, golden, golden_path, kept_corners, parse_rows, read_bytes, write

ROOT = Path(__file__).resolve().parents[2]


def decode_stored(fmt, tensors, shape):
    return fmt.decode(*fmt.unpack(tensors, shape))[: shape[0], : shape[1]]


def kept_file(fmt):
    if not golden_path(fmt).exists():
        pytest.fail(f"{fmt.name} has no golden file. Write it, then check every block by hand: {command(fmt)}")
    return json.loads(golden_path(fmt).read_text(encoding="utf-8"))


@pytest.mark.parametrize("fmt", all_formats(), ids=lambda fmt: fmt.name)
def test_encoder_and_decoder_keep_to_the_golden_file(fmt):
    kept = kept_file(fmt)
    ours = golden(fmt, kept_corners(kept))
    for block, mine in zip(kept["blocks"], ours["blocks"], strict=True):
        assert mine == block, f"{fmt.name} now stores:\n{file_text(mine)}"
        rows = parse_rows(block.get("weight") or block["weight, rotated"])
        tensors = {suffix: read_bytes(entry) for suffix, entry in block["tensors"].items()}
        decoded = decode_stored(variant(fmt), tensors, tuple(rows.shape))
        assert torch.equal(decoded, parse_rows(block["decoded"])), f"{fmt.name}, {block['name']}"
    if fmt.rotation is not None:  # rotating by 256 is a matrix product, which sums in another order elsewhere
        kept["whole"].pop("sha256"), ours["whole"].pop("sha256")
    assert ours == kept


def test_golden_files_are_those_of_the_formats():
    assert {path.stem for path in FOLDER.glob("*.json")} <= {fmt.name for fmt in all_formats()}


def test_a_format_without_a_golden_file_fails_with_the_command_that_writes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("golden_file.FOLDER", tmp_path)
    with pytest.raises(pytest.fail.Exception, match="python -m tests.golden --format nvfp4"):
        kept_file(get_format("nvfp4"))


@pytest.mark.parametrize("fmt", all_formats(), ids=lambda fmt: fmt.name)
def test_a_golden_file_is_written_once_and_never_overwritten(fmt, tmp_path, monkeypatch):
    monkeypatch.setattr("golden_file.FOLDER", tmp_path)
    path = write(fmt)
    assert json.loads(path.read_text(encoding="utf-8")) == golden(fmt, general_corners(variant(fmt)))
    path.write_text("kept", encoding="utf-8")
    with pytest.raises(FileExistsError):
        write(fmt)
    assert path.read_text(encoding="utf-8") == "kept"


def test_the_command_says_why_it_does_not_overwrite():
    path = min(FOLDER.glob("*.json"))  # one that is there, so that this test never writes a file
    before = path.read_bytes()
    call = [sys.executable, *command(get_format(path.stem)).split()[1:]]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "exists, and is not overwritten" in done.stderr
    assert path.read_bytes() == before
