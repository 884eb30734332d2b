"""Editing configs: tensors and header agree, everything else stays byte for byte, unloadable results are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves the folder of the tests out
from comfyui_quantpress.quant_core.checkpoint.source import open_source  # noqa: E402
from comfyui_quantpress.quant_core.errors import Cancelled, PlanError, RequestError  # noqa: E402
from comfyui_quantpress.quant_core.formats import get_format  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.verify import check_file  # noqa: E402
from comfyui_quantpress.quant_core.tools.cleanup import add_legacy_input, cleanup_legacy  # noqa: E402
from comfyui_quantpress.quant_core.tools.configs import HeaderMode  # noqa: E402
from comfyui_quantpress.quant_core.tools.edit import Edit, edit, parse_pairs  # noqa: E402
from comfyui_quantpress.quant_core.tools.migrate import migrate  # noqa: E402
from tool_files import assert_untouched, bystanders, canonical_file, config_of, quantized, save  # noqa: E402

CONFIGS = {"blocks.0.comfy_quant", "blocks.1.comfy_quant"}
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
)
FREE_KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
    lambda key: key not in ("format", "group_size", "shape", "orig_shape", "params", "convrot", "per_row")
)


def edited(source: Path, change: Edit) -> Path:
    target = source.with_name("edited.safetensors")
    with open_source(source) as src:
        edit(src, change).apply(target, overwrite=True)
    return target


def header_of(path: Path) -> dict:
    with open_source(path) as src:
        return json.loads(src.metadata["_quantization_metadata"])


@given(add=st.dictionaries(FREE_KEYS, PLAIN | st.lists(PLAIN, max_size=3), max_size=4))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_goes_in_and_comes_out_again(tmp_path, add):
    source = canonical_file(tmp_path / "a.safetensors", "int8_blockwise")
    target = edited(source, Edit(add=add))
    for layer in ("blocks.0", "blocks.1"):
        assert config_of(target, layer) == {**config_of(source, layer), **add}
        assert header_of(target)["layers"][layer] == config_of(target, layer)
    assert_untouched(source, target, CONFIGS)
    assert not check_file(target).findings
    back = source.with_name("back.safetensors")
    with open_source(target) as src:
        edit(src, Edit(remove=tuple(add))).apply(back, overwrite=True)
    assert back.read_bytes() == source.read_bytes() or not add


def test_filter_edits_only_its_layers(tmp_path):
    source = canonical_file(tmp_path / "a.safetensors")
    target = edited(source, Edit(add={"full_precision_matrix_mult": True}, layers=r"\.1$"))
    assert "full_precision_matrix_mult" not in config_of(target, "blocks.0")
    assert config_of(target, "blocks.1")["full_precision_matrix_mult"] is True
    assert header_of(target)["layers"] == {layer: config_of(target, layer) for layer in ("blocks.0", "blocks.1")}
    assert_untouched(source, target, {"blocks.1.comfy_quant"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("int8_blockwise", Edit(remove=["format"]), "without `format`"),
        ("int8_blockwise", Edit(add={"group_size": 64}), "blocks.0.*64"),
        ("int8_lodewise", Edit(remove=["group_size"], add={"group_size": 32}), "blocks.1"),
        ("float8_e4m3fn", Edit(add={"format": "nvfp4"}), "lack|missing|needs"),
        ("float8_e4m3fn", Edit(add={"format": "no_such"}), "no_such"),
        ("bnb_nf4", Edit(add={"group_size": 32}), "weight_scale"),
        ("nvfp4", Edit(add={"orig_shape": [512, 512]}), "512"),
        ("float8_e4m3fn", Edit(add={"params": {"x": 1}}), "nests an object"),
    ],
)
def test_what_would_not_load_is_refused_unless_forced(tmp_path, name, change, message):
    source = canonical_file(tmp_path / "a.safetensors", name)
    with open_source(source) as src, pytest.raises(PlanError, match=message):
        edit(src, change)


def test_force_writes_an_unloadable_config(tmp_path):
    source = canonical_file(tmp_path / "a.safetensors", "int8_blockwise")
    with open_source(source) as src:
        edit(src, Edit(add={"group_size": 64}, force=True)).apply(tmp_path / "b.safetensors", force=True)
    assert config_of(tmp_path / "b.safetensors", "blocks.0")["group_size"] == 64
    with open_source(source) as src:
        edit(src, Edit(remove=["format"], force=True)).apply(tmp_path / "c.safetensors", force=True)
    assert "format" not in config_of(tmp_path / "c.safetensors", "blocks.0")


def test_header_is_built_from_the_tensors_and_tensors_from_the_header(tmp_path):
    source = canonical_file(tmp_path / "a.safetensors", header=False)
    assert "_quantization_metadata" not in open_source(edited(source, Edit(add={"x": 1}))).metadata
    target = tmp_path / "b.safetensors"
    with open_source(source) as src:
        edit(src, Edit(header=HeaderMode.BUILD)).apply(target)
    assert header_of(target)["layers"]["blocks.0"] == config_of(source, "blocks.0")
    assert_untouched(source, target)
    tensors, configs = quantized(get_format("float8_e4m3fn"))
    header_only = save(
        tmp_path / "c.safetensors",
        {**tensors, **bystanders()},
        metadata={"_quantization_metadata": json.dumps({"layers": configs, "note": "stays"})},
    )
    with open_source(header_only) as src:
        edit(src, Edit(header=HeaderMode.BUILD)).apply(tmp_path / "d.safetensors")
    assert config_of(tmp_path / "d.safetensors", "blocks.1") == configs["blocks.1"]
    assert header_of(tmp_path / "d.safetensors")["note"] == "stays"


def test_header_can_be_dropped(tmp_path):
    source = canonical_file(tmp_path / "a.safetensors")
    target = edited(source, Edit(header=HeaderMode.DROP))
    with open_source(target) as src:
        assert set(src.metadata) == {"keep", "format"}
    assert_untouched(source, target)


def test_preview_says_what_changes_and_writes_nothing(tmp_path):
    source = canonical_file(tmp_path / "a.safetensors")
    with open_source(source) as src:
        changes = edit(src, Edit(add={"x": 1}, layers="blocks.0")).changes()
    assert {(change.kind, change.name) for change in changes} == {
        ("rewritten", "blocks.0.comfy_quant"),
        ("header-set", "_quantization_metadata"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("'full_precision_matrix_mult': true", {"full_precision_matrix_mult": True}),
        ("'a': False, \"b\": None, 'c': -1.5, 'd': 'true, x'", {"a": False, "b": None, "c": -1.5, "d": "true, x"}),
        ('{"a": [1, 2], "b": null}', {"a": [1, 2], "b": None}),
        ('"a": 1', {"a": 1}),
        ("", {}),
    ],
)
def test_keys_are_typed_as_json_or_as_python(text, pairs):
    assert parse_pairs(text) == pairs


@given(st.dictionaries(st.text(max_size=6), PLAIN, max_size=4))
def test_every_json_object_is_read_back(pairs):
    assert parse_pairs(json.dumps(pairs)) == pairs
    assume(all("\r" not in repr(item) for item in pairs.items()))
    assert parse_pairs(repr(pairs)) == pairs


@pytest.mark.parametrize("text", ["a: 1", "'a': x", "'a': {'b': 1}", "'a': __import__('os')", "1: 2", "'a' 1"])
def test_anything_else_is_refused(text):
    with pytest.raises(RequestError, match="^add "):
        parse_pairs(text)


def test_a_pattern_that_finds_nothing_is_an_error(tmp_path):
    with (
        open_source(canonical_file(tmp_path / "a.safetensors")) as src,
        pytest.raises(RequestError, match="finds none of the 2"),
    ):
        edit(src, Edit(add={"x": 1}, layers="nowhere"))


def legacy(path: Path) -> Path:
    tensors, _ = quantized(get_format("float8_e4m3fn"))
    old = {
        key.replace("weight_scale", "scale_weight"): t.reshape(1) if key.endswith("scale") else t
        for key, t in tensors.items()
    }
    return save(
        path,
        {
            **old,
            **bystanders(),
            "final.scale_weight": torch.ones(1),
            "blocks.0.scale_input": torch.tensor([0.5]),
            "scaled_fp8": torch.zeros(1).to(torch.float8_e4m3fn),
        },
    )


@pytest.mark.parametrize("marker", [0, 2])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("scale_input", [True, False])
def test_cleanup_keeps_the_legacy_form(tmp_path, marker, normalise, scale_input):
    source, target = legacy(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    with open_source(source) as src:
        cleanup_legacy(src, marker=marker, scale_input=scale_input, normalise=normalise).apply(target)
    with open_source(target) as src:
        assert src.tensors["scaled_fp8"].shape == (marker,) and "final.scale_weight" not in src.tensors
        assert src.tensors["blocks.0.scale_weight"].shape == (() if normalise else (1,))
        assert ("blocks.1.scale_input" in src.tensors) is scale_input
        assert float(src.read("blocks.0.scale_input")) == 0.5
        assert cleanup_legacy(src, marker=marker, scale_input=scale_input, normalise=normalise).changes() == ()
    assert_untouched(
        source,
        target,
        {"scaled_fp8", "final.scale_weight"}
        | ({f"blocks.{i}.scale_{what}" for i in (0, 1) for what in ("weight", "input")} if normalise else set()),
    )


def test_legacy_input_add(tmp_path):
    source, target = legacy(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    with open_source(source) as src:
        add_legacy_input(src).apply(target)
    with open_source(target) as src:
        assert src.tensors["scaled_fp8"].shape == (1,)
        assert src.read("blocks.1.scale_input").shape == () and float(src.read("blocks.1.scale_input")) == 1.0
        assert "final.scale_input" not in src.tensors and "final.scale_weight" in src.tensors
    assert_untouched(source, target)


def test_cancel_leaves_nothing(tmp_path):
    source = canonical_file(tmp_path / "a.safetensors")
    with open_source(source) as src, pytest.raises(Cancelled):
        migrate(src).apply(tmp_path / "b.safetensors", cancel=lambda: True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="kills with SIGKILL")
def test_a_kill_in_the_middle_leaves_no_plausible_file(tmp_path):
    source, target = canonical_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    code = f"""
import time
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.tools.edit import Edit, edit
def slow(state):
    print(state.done_layers, flush=True)
    time.sleep(0.2)
with open_source({str(source)!r}) as src:
    edit(src, Edit(add={{"x": 1}})).apply({str(target)!r}, progress=slow)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while int(process.stdout.readline()) < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not target.exists()
    assert all(path.name == "a.safetensors" or path.suffix == ".part" for path in tmp_path.iterdir())
    assert edited(source, Edit(add={"x": 1})).exists()
