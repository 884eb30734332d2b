"""What the kind of a model says about its layers: the plan obeys it, and verify finds what did not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from comfyui_quantpress.quant_core.checkpoint.metadata import HEADER_KEY, build_header_metadata, encode_config
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import PlanError
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.pipeline.model_rules import OUTSIDE, UNKNOWN
from comfyui_quantpress.quant_core.pipeline.plan import RECIPE_KEY, Plan, make_plan
from comfyui_quantpress.quant_core.pipeline.request import Request
from comfyui_quantpress.quant_core.pipeline.run import convert
from comfyui_quantpress.quant_core.pipeline.verify import check_file
from comfyui_quantpress.quant_core.policy.architectures import Architecture, architectures, in_numbered_block
from comfyui_quantpress.quant_core.policy.general import Policy, Rule
from comfyui_quantpress.quant_core.policy.recipe import Recipe, parse_recipe
from known_models import state_of, zeros
from safetensors.torch import load_file, save_file

BY_ID = {known.id: known for known in architectures()}
NOT_RUN = [known for known in architectures() if not known.runs_quantized and known.sort != "VAE"]
RUN = [known for known in architectures() if known.runs_quantized]
EVERYTHING = Policy(only=(".",))


def recipe(name: str) -> Recipe:
    return parse_recipe(get_format(name), "absmax", "nearest")


def plan_of(path: Path, fmt: str = "int8_rowwise", policy: Policy | None = None, **options) -> Plan:
    with open_source(path) as src:
        target = path.with_name("out.safetensors")
        return make_plan(src, Request(path, target, recipe(fmt), policy or Policy(), **options))


def reasons(plan: Plan) -> dict[str, str]:
    return {layer.layer: layer.reason for layer in plan.kept}


def ids(models: list[Architecture]) -> list[str]:
    return [known.id for known in models]


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["int8_rowwise", "nvfp4", "bnb_nf4"])
@pytest.mark.parametrize("known", RUN, ids=ids(RUN))
def test_only_linear_layers_are_planned_and_what_detection_reads_keeps_its_shape(known, fmt, tmp_path):
    """Even when all of them are asked for."""
    path = zeros(tmp_path / "model.safetensors", state_of(known, size=64))
    plan = plan_of(path, fmt, EVERYTHING)
    assert plan.quantized
    shapes = {output.name: output.shape for output in plan.outputs}
    for layer in plan.quantized:
        weight = f"{layer.layer}.weight"
        assert known.kind_of(weight) == "linear", weight
        assert not known.shape_read(weight) or shapes[weight] == layer.shape, weight
    kept = reasons(plan)
    for weight, shape in state_of(known, size=64).items():
        if weight.endswith(".weight") and len(shape) == 2 and known.kind_of(weight) not in (None, "linear"):
            assert known.name in kept[weight.removesuffix(".weight")], weight


@pytest.mark.parametrize("known", RUN, ids=ids(RUN))
def test_layers_outside_the_numbered_blocks_are_kept_unless_they_are_named(known, tmp_path):
    path = zeros(tmp_path / "model.safetensors", state_of(known, size=64))
    plan = plan_of(path)
    assert all(in_numbered_block(layer.layer.removeprefix(known.prefix)) for layer in plan.quantized)
    outside = [layer for layer, reason in reasons(plan).items() if reason == OUTSIDE]
    if outside:
        named = Policy(only=tuple(f"^{re.escape(layer)}$" for layer in outside))
        assert {layer.layer for layer in plan_of(path, policy=named).quantized} == set(outside)


@pytest.mark.parametrize("known", NOT_RUN, ids=ids(NOT_RUN))
def test_what_comfyui_does_not_run_quantized_is_refused_unless_it_is_for_another_runtime(known, tmp_path):
    shapes = {name: (64,) * len(shape) for name, shape in state_of(known).items()} | state_of(known, size=64)
    path = zeros(tmp_path / "model.safetensors", shapes | {"extra.blocks.0.fc.weight": (64, 64)})
    with pytest.raises(PlanError, match="ComfyUI does not run that quantized") as caught:
        plan_of(path)
    assert known.sort in str(caught.value) and str(path) in str(caught.value)
    forced = plan_of(path, policy=EVERYTHING, other_runtime=True)
    assert forced.quantized and json.loads(forced.metadata[RECIPE_KEY])["other_runtime"] is True
    assert any("another runtime" in warning for warning in forced.warnings)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "dit.", "ema.", "module._orig_mod.", "_orig_mod.net."])
def test_a_prefix_that_comfyui_does_not_take_off_is_refused_before_any_work(prefix, tmp_path):
    path = zeros(tmp_path / "model.safetensors", state_of(BY_ID["flux"], 3, prefix, 64))
    with pytest.raises(PlanError, match=f"begin with '{re.escape(prefix)}'.*merge extract"):
        plan_of(path)
    plain = zeros(tmp_path / "plain.safetensors", state_of(BY_ID["flux"], 3, "", 64))
    for policy in (Policy(), EVERYTHING):
        forced, expected = plan_of(path, policy=policy, other_runtime=True), plan_of(plain, policy=policy)
        assert reasons(forced) == {prefix + layer: reason for layer, reason in reasons(expected).items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.model.", "net.", "model."])
def test_a_prefix_of_comfyuis_own_changes_nothing(prefix, tmp_path):
    path = zeros(tmp_path / "model.safetensors", state_of(BY_ID["flux"], 3, prefix, 64))
    plain = zeros(tmp_path / "plain.safetensors", state_of(BY_ID["flux"], 3, "", 64))
    assert reasons(plan_of(path)) == {prefix + layer: reason for layer, reason in reasons(plan_of(plain)).items()}


def test_the_parts_of_a_checkpoint_beside_the_model_are_kept(tmp_path):
    shapes = state_of(BY_ID["stable_audio"], 3, "model.model.", 64) | {
        "pretransform.model.decoder.layers.1.fc.weight": (64, 64),
        "conditioner.conditioners.prompt.proj_out.weight": (64, 64),
        "first_stage_model.decoder.mid.0.attn.q.weight": (64, 64),
    }
    kept = reasons(plan_of(zeros(tmp_path / "model.safetensors", shapes)))
    assert kept["pretransform.model.decoder.layers.1.fc"] == "not a part of Stable Audio"
    assert kept["conditioner.conditioners.prompt.proj_out"] == "a text encoder inside a checkpoint"
    assert kept["first_stage_model.decoder.mid.0.attn.q"] == "part of the VAE"
    assert kept["model.model.timestep_features"].startswith("a parameter of Stable Audio")
    assert kept["model.model.transformer.project_in"] == "input layer"


def test_of_an_unknown_model_only_numbered_blocks_are_taken_and_one_sentence_says_so(tmp_path):
    shapes = {f"stage.{n}.mix.weight": (64, 64) for n in range(4)} | {
        "lift.weight": (64, 64),
        "drop.0.weight": (64, 64),
    }
    plan = plan_of(zeros(tmp_path / "model.safetensors", shapes))
    assert [layer.layer for layer in plan.quantized] == [f"stage.{n}.mix" for n in range(4)]
    assert reasons(plan) == {"lift": OUTSIDE, "drop.0": OUTSIDE}
    assert plan.warnings.count(UNKNOWN) == 1
    named = plan_of(tmp_path / "model.safetensors", policy=Policy(rules=(Rule("^lift$", recipe("int8_rowwise")),)))
    assert "lift" in {layer.layer for layer in named.quantized}


def test_a_file_that_grows_is_said(tmp_path):
    shapes = {f"blocks.{n}.mix.weight": (2, 16) for n in range(4)}
    plan = plan_of(zeros(tmp_path / "model.safetensors", shapes))
    assert plan.output_bytes >= plan.source_bytes
    assert any("not smaller than its source" in warning for warning in plan.warnings)


def test_a_model_that_only_some_loaders_run_quantized_is_said(tmp_path):
    path = zeros(tmp_path / "model.safetensors", state_of(BY_ID["qwen3vl_4b"], 2, "", 64))
    assert any("flux2" in warning for warning in plan_of(path).warnings)


# --- verify ----------------------------------------------------------------------------------------------------------


def quantized_by_a_stranger(path: Path, layers: dict[str, str]) -> Path:
    """The file with these layers, {layer: format}, quantized: as a tool does that knows no models."""
    tensors, out = load_file(path), path.with_name("stranger.safetensors")
    described = {}
    for layer, name in layers.items():
        fmt = get_format(name)
        weight = tensors.pop(f"{layer}.weight").float()
        for suffix, tensor in fmt.quantize(weight).items():
            tensors[f"{layer}.{suffix}"] = tensor
        described[layer] = fmt.config(tuple(weight.shape), torch.bfloat16)
        tensors[f"{layer}.comfy_quant"] = encode_config(described[layer])
    save_file(tensors, out, {HEADER_KEY: build_header_metadata(described)})
    return out


def codes(path: Path) -> list[tuple[str, str, str]]:
    """(code, severity, layer) of what the kind of the model makes wrong."""
    of_models = ("not-linear", "packed-shape", "not-for-comfyui")
    return [(f.code, f.severity, f.layer) for f in check_file(path).findings if f.code in of_models]


@pytest.mark.parametrize(
    ("id", "layer", "fmt", "wrong"),
    [
        ("t5_xxl", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "int8_blockwise", True),
        ("t5_xxl", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "mxfp8", True),
        ("t5_xxl", "shared", "float8_e4m3fn", False),  # ComfyUI reads such an embedding
        ("wan", "motion_encoder.enc.fc.0", "int8_rowwise", True),
        ("wan", "motion_encoder.dec.direction", "float8_e4m3fn", True),
        ("wan", "blocks.0.ffn.0", "int8_rowwise", False),
        ("hidream", "double_stream_blocks.0.block.ff_i.gate", "int8_rowwise", True),
    ],
)
def test_verify_knows_what_is_no_linear_layer(id, layer, fmt, wrong, tmp_path):
    path = zeros(tmp_path / "model.safetensors", state_of(BY_ID[id], 1, "", 64) | {f"{layer}.weight": (128, 128)})
    assert codes(quantized_by_a_stranger(path, {layer: fmt})) == ([("not-linear", "error", layer)] if wrong else [])


def test_verify_knows_which_shapes_detection_reads(tmp_path):
    layer = "transformer_blocks.0.attn2.to_k"
    path = zeros(tmp_path / "model.safetensors", state_of(BY_ID["ltxv"], 2, "", 64))
    assert codes(quantized_by_a_stranger(path, {layer: "nvfp4"})) == [("packed-shape", "error", layer)]
    assert codes(quantized_by_a_stranger(path, {layer: "int8_rowwise"})) == []


def test_verify_knows_what_comfyui_does_not_run_quantized_and_what_was_made_for_another_runtime(tmp_path):
    path = zeros(tmp_path / "model.safetensors", state_of(BY_ID["clip_l"], 1, "", 64))
    layer = "text_model.encoder.layers.0.mlp.fc1"
    assert codes(quantized_by_a_stranger(path, {layer: "int8_rowwise"})) == [("not-for-comfyui", "error", "")]
    request = Request(path, tmp_path / "out.safetensors", recipe("int8_rowwise"), device="cpu", other_runtime=True)
    convert(request)
    assert codes(request.target) == [("not-for-comfyui", "warning", "")]


def test_verify_knows_a_prefix_that_comfyui_does_not_take_off(tmp_path):
    path = zeros(tmp_path / "model.safetensors", state_of(BY_ID["wan"], 2, "module.", 64))
    layer = "module.blocks.0.ffn.0"
    assert codes(quantized_by_a_stranger(path, {layer: "int8_rowwise"})) == [("not-for-comfyui", "error", "")]
