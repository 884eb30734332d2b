"""The engine's table of architectures against the ComfyUI that is present: its classes, its detection, its loaders."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from comfy_server import COMFYUI, PYTHON, missing
from comfyui_quantpress.quant_core.names.file_prefixes import prefix_for_comfyui
from comfyui_quantpress.quant_core.policy.architectures import architectures, recognise

HERE = Path(__file__).parent
KNOWN = {known.id: known for known in architectures()}
CONFIGS = json.loads((HERE / "architecture_configs.json").read_text("utf-8"))
ENCODERS = json.loads((HERE / "text_encoder_configs.json").read_text("utf-8"))
LATER = json.loads((HERE / "later_models.json").read_text("utf-8"))
VARIANTS = [(name, variant) for name, entry in CONFIGS.items() for variant in entry["variants"]]
DIMENSIONS = {"linear": 2, "embedding": 2, "gate": 2, "conv": 4, "parameter": 2}
LOADERS = {
    "controlnet": ("comfy/controlnet.py",),
    "t2i_adapter": ("comfy/controlnet.py",),
    "model_patch": ("comfy_extras/nodes_model_patch.py",),
    "style_model": ("comfy/sd.py",),
    "gligen": ("comfy/gligen.py", "comfy/sd.py"),
    "clip_vision": ("comfy/clip_vision.py",),
    "audio_encoder": ("comfy/audio_encoders/audio_encoders.py",),
    "vae": ("comfy/sd.py",),
}
QUANTIZED = ("mixed_precision_ops", "detect_layer_quantization", "quantization_metadata")


@pytest.fixture(scope="module")
def present(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What read_architectures.py finds in the present ComfyUI."""
    if missing():
        pytest.skip(missing())
    out = tmp_path_factory.mktemp("architectures") / "records.json"
    done = subprocess.run(
        [PYTHON, HERE / "read_architectures.py", COMFYUI, out],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text("utf-8"))


def record_of(records: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    for key in keys:
        if key not in records:
            pytest.skip("the present ComfyUI does not have this model")
        records = records[key]
    return records


def tensors(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, kind) of the model's tensors."""
    for name, kind in record["kinds"].items():
        yield (name if kind == "parameter" else f"{name}.weight"), kind


def check(record: Mapping[str, Any], expected: str, prefix: str = "") -> None:
    state = {prefix + name: (8,) * DIMENSIONS[kind] for name, kind in tensors(record)}
    model = recognise(state | {name: tuple(shape) for name, shape in record["signs"].items()})
    assert model is not None and model.architecture is KNOWN[expected] and model.prefix == ""
    different = {name: model.kind_of(name) for name, kind in tensors(record) if model.kind_of(name) != kind}
    assert not different, different
    assert [name for name in record["reads"] if not model.shape_read(name)] == []


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=[variant for _, variant in VARIANTS])
def test_the_table_has_what_comfyuis_classes_say_of_a_diffusion_model(present, name, variant):
    check(record_of(present["models"], name, variant), name, CONFIGS[name].get("prefix", ""))


@pytest.mark.parametrize("name", ENCODERS)
def test_the_table_has_what_comfyuis_classes_and_loader_say_of_a_text_encoder(present, name):
    record = record_of(present["text_encoders"], name)
    known = KNOWN[name]
    if name == "t5":  # stands for other sizes; its record has those of the largest
        assert all(known.kind_of(tensor) == kind for tensor, kind in tensors(record))
    else:
        check(record, name)
    runs = record["runs_quantized"]
    assert known.runs_quantized == any(runs.values())
    assert [kind.lower() for kind, run in runs.items() if not run and any(runs.values())] == list(known.not_as)


def test_every_model_of_the_table_was_read_from_classes_or_is_one_that_no_loader_runs_quantized():
    assert set(KNOWN) == {*CONFIGS, *ENCODERS, *LATER, *LOADERS, "ip_adapter"}  # IP-Adapters run in other packs


@pytest.mark.parametrize("name", LOADERS)
def test_the_marks_of_other_models_are_those_that_their_loaders_look_for(name):
    if missing():
        pytest.skip(missing())
    source = "".join((COMFYUI / file).read_text("utf-8") for file in LOADERS[name])
    for mark in [mark for marks in KNOWN[name].marks for mark in marks]:
        without = re.sub(r"^(control_model\.|model\.|wav2vec2\.)", "", mark)  # what the loaders put on or take off
        assert without in source, mark


@pytest.mark.parametrize("file", sorted({file for files in LOADERS.values() for file in files} - {"comfy/sd.py"}))
def test_these_loaders_know_nothing_of_quantized_layers(file):
    if missing():
        pytest.skip(missing())
    source = (COMFYUI / file).read_text("utf-8")
    assert not [word for word in QUANTIZED if word in source]


def test_the_prefix_is_the_one_that_comfyui_takes_off(present):
    assert present["prefixes"]
    for names, prefix in present["prefixes"]:
        assert prefix_for_comfyui(names) == prefix, names
