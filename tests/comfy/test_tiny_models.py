"""Tiny random models of many architectures: quantized by command and node, loaded by ComfyUI's own loader, and run.

The error is the output's, relative to the 16-bit model's. A model passes on the error of its weights, larger or
smaller by a factor of its own, much the same for every format: its `amplification` in the table, as measured, 0.2
to 4. Outputs were within (median over the models, and the largest): INT8 ConvRot 0.8 %, 4.4 %; FP8 2.2 %, 9.1 %;
NVFP4 7.8 %, 29 %; NF4 7.8 %, 33 %.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import ROOT, missing
from comfyui_quantpress.cli.main import main
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.pipeline.verify import check_file
from tiny_models import TABLE, Worker

LARGE = "QUANTPRESS_TEST_LARGE"
# Of random weights, as the command's report says; of INT8 with what its rounded inputs add.
WEIGHT_ERROR = {"int8_convrot": 0.0105, "float8_e4m3fn": 0.0265, "nvfp4": 0.095, "bnb_nf4": 0.092}
HEADROOM = 1.4


@dataclass(frozen=True)
class Tiny:
    """A model of the table as a 16-bit file. known: what ComfyUI takes it for."""

    name: str
    file: Path
    known: dict[str, Any]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    if missing():
        pytest.skip(missing())
    folder = tmp_path_factory.mktemp("tiny")
    running = Worker(folder, "tiny_script.py", ROOT, folder)
    yield running
    running.end()


@pytest.fixture(scope="module", params=TABLE)
def tiny(request: pytest.FixtureRequest, worker: Worker) -> Iterator[Tiny]:
    name = request.param
    if TABLE[name].get("large") and not os.environ.get(LARGE):
        pytest.skip(f"its file has 0.5 to 1.8 GB: set {LARGE}=1")
    file = worker.folder / f"{name}.safetensors"
    yield Tiny(name, file, worker.ask("build", name=name, file=file))
    file.unlink()


def same_tensors(one: Path, other: Path) -> bool:
    with open_source(one) as first, open_source(other) as second:
        return first.tensors == second.tensors and all(
            torch.equal(first.read_bytes(name), second.read_bytes(name)) for name in first.tensors
        )


def check(found: dict[str, Any], tiny: Tiny, fmt: str) -> None:
    assert found["logged"] == []
    assert (found["class"], found["config"]) == (tiny.known["class"], tiny.known["config"])
    assert found["quantized"] > 0
    assert 0 < found["error"] < HEADROOM * TABLE[tiny.name]["amplification"] * WEIGHT_ERROR[fmt]


def test_the_table_has_twenty_architectures():
    assert len({entry["family"] for entry in TABLE.values() if not entry.get("large")}) >= 20


def test_the_16_bit_model_is_what_it_was_built_as_and_says_something(tiny):
    assert tiny.known["class"] == tiny.known["expected"]
    assert tiny.known["logged"] == [] and tiny.known["quantized"] == 0
    assert tiny.known["finite"] and 0.1 < tiny.known["spread"] < 10


@pytest.mark.parametrize("fmt", WEIGHT_ERROR)
def test_quantized_it_is_the_same_model_within_the_formats_bound(tiny, worker, fmt, capsys):
    by_command = worker.folder / f"{tiny.name}-{fmt}-command.safetensors"
    assert main(["quantize", str(tiny.file), str(by_command), "--format", fmt, "--device", "cpu"]) == 0
    assert check_file(by_command).errors == ()
    by_node = Path(worker.ask("by_node", name=tiny.name, file=tiny.file, format=fmt)["file"])
    try:
        check(worker.ask("load", name=tiny.name, file=by_command), tiny, fmt)
        assert same_tensors(by_node, by_command)
    finally:
        by_command.unlink()
        by_node.unlink()
