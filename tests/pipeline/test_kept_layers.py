"""A source in another form than ComfyUI's: what is kept of it loads beside what is quantized anew."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves the folder of the tests out
from comfyui_quantpress.quant_core.checkpoint.source import open_source  # noqa: E402
from comfyui_quantpress.quant_core.errors import InputFileError, PlanError  # noqa: E402
from comfyui_quantpress.quant_core.formats import get_format  # noqa: E402
from comfyui_quantpress.quant_core.numerics.metrics import relative_error  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.compare import verify_file  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.plan import make_plan  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.request import Request  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.run import convert  # noqa: E402
from comfyui_quantpress.quant_core.policy.general import Policy  # noqa: E402
from comfyui_quantpress.quant_core.policy.recipe import Recipe  # noqa: E402
from comfyui_quantpress.quant_core.stored.layers import stored_layers  # noqa: E402
from kept_files import FORMS, KEPT, PREFIX, TAKEN, as_comfyui_reads, bare, legacy, truth  # noqa: E402

INT8 = Recipe(get_format("int8_rowwise"))
# Of the roughest format among the forms (NVFP4 and NF4), requantized to INT8.
WORST = 0.13


def decoded(path: Path) -> dict[str, torch.Tensor]:
    with open_source(path) as src:
        return {f"{layer}.weight": entry.decode(src) for layer, entry in stored_layers(src).items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [(), (r"mlp\.fc2",)], ids=["rules", "named"])
def test_every_layer_of_a_quantized_source_loads(tmp_path, form, keep):
    (folder := tmp_path / "source").mkdir()
    source, target = FORMS[form](folder / "model.safetensors"), tmp_path / "out.safetensors"
    before = decoded(source)
    convert(Request(source, target, INT8, Policy(keep=keep)))
    read, prefix = as_comfyui_reads(target), PREFIX if form == "legacy, prefix" else ""
    for name, weight in truth().items():
        if not name.endswith("weight"):
            continue
        assert relative_error(weight.float(), read[prefix + name]) < WORST, name
        kept = name.startswith(KEPT) or (keep and "fc2" in name)
        if kept and prefix + name in before:  # no value of a kept layer changes
            assert torch.equal(read[prefix + name], before[prefix + name]), name
    report = verify_file(target, against=source)
    assert not report.findings and len(report.layers) >= len(TAKEN) - (2 if keep else 0)
    with safe_open(target, "pt") as file:
        names, header = set(file.keys()), json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert {f"{layer}.comfy_quant" for layer in header} == {name for name in names if name.endswith("comfy_quant")}
    old = ("scale_weight", "scale_input", "scaled_fp8", "absmax", "quant_map", "weight_scale_inv", "weight_scalar")
    assert not [name for name in names if name.endswith(old)]


def test_the_report_and_the_dry_run_say_what_became_of_kept_layers(tmp_path):
    source = legacy(tmp_path / "model.safetensors")
    with open_source(source) as src:
        plan = make_plan(src, Request(source, tmp_path / "out.safetensors", INT8))
    report = convert(Request(source, tmp_path / "out.safetensors", INT8))
    reasons = {layer.layer: layer.reason for layer in plan.kept}
    assert reasons == {row.layer: row.reason for row in report.layers if row.format is None}
    assert reasons["img_in"] == "input layer; legacy form -> comfy_quant"
    assert any("4 kept layers are in the legacy form" in warning for warning in plan.warnings)
    with open_source(tmp_path / "out.safetensors") as out:
        assert {(t.name, t.dtype, t.shape) for t in out.tensors.values()} == {
            (o.name, o.dtype, o.shape) for o in plan.outputs
        }
        assert out.nbytes == plan.output_bytes


def test_full_precision_of_a_legacy_marker_stays_with_its_kept_layers(tmp_path):
    source = FORMS["legacy, full precision"](tmp_path / "model.safetensors")
    convert(Request(source, tmp_path / "out.safetensors", INT8))
    with open_source(tmp_path / "out.safetensors") as src:
        stored = stored_layers(src)
    assert all(stored[layer].config.get("full_precision_matrix_mult") is True for layer in KEPT)
    assert not any("full_precision_matrix_mult" in stored[layer].config for layer in TAKEN)


def test_an_input_scale_goes_with_its_kept_layer(tmp_path):
    source = legacy(tmp_path / "model.safetensors", inputs=True)
    convert(Request(source, tmp_path / "out.safetensors", INT8))
    tensors = load_file(tmp_path / "out.safetensors")
    assert {name for name in tensors if name.endswith("input_scale")} == {f"{layer}.input_scale" for layer in KEPT}
    assert all(tensors[f"{layer}.input_scale"].shape == () for layer in KEPT)


def test_what_comfyui_would_not_read_in_its_own_form_is_decoded(tmp_path):
    """A packed weight whose shape must not change, and scales that no check lets pass."""
    source = FORMS["bitsandbytes"](tmp_path / "model.safetensors")
    target = tmp_path / "out.safetensors"
    expected = decoded(source)["img_in.weight"].bfloat16()
    report = convert(Request(source, target, INT8, never_pack=frozenset(["img_in"])))
    reasons = {row.layer: row.reason for row in report.layers}
    assert reasons["img_in"] == "input layer; decoded to bf16, as ComfyUI's model detection reads its shape"
    assert any("1 kept layer is decoded to bf16: img_in" in str(warning) for warning in report.warnings)
    tensors = load_file(target)
    assert torch.equal(tensors["img_in.weight"], expected) and "img_in.comfy_quant" not in tensors
    assert not [name for name in tensors if name.startswith("img_in.weight.")]
    plain = tmp_path / "plain.safetensors"
    save_file(truth(), plain)
    assert not verify_file(target, against=source).findings and not verify_file(target, against=plain).findings
    save_file(tensors | {"img_in.weight": expected * 2}, target, safe_open(target, "pt").metadata())
    for reference, code in ((source, "copy-differs"), (plain, "large-error")):
        assert [(f.code, f.layer) for f in verify_file(target, against=reference).findings] == [(code, "img_in")]


def test_a_kept_layer_with_a_broken_scale_is_decoded_and_fails_no_check(tmp_path):
    source = bare(tmp_path / "model.safetensors")
    tensors = load_file(source)
    tensors["blocks.0.mlp.fc2.weight_scale"].fill_(torch.nan)
    save_file(tensors, source)
    target = tmp_path / "out.safetensors"
    report = convert(Request(source, target, INT8, allow_nonfinite=True))
    row = next(row for row in report.layers if row.layer == "blocks.0.mlp.fc2")
    assert row.format is None and "decoded to bf16, as its scales are not positive numbers" in row.reason
    assert bool(load_file(target)["blocks.0.mlp.fc2.weight"].isnan().all())


def test_an_embedding_in_fp8_is_decoded_where_the_model_is_known(tmp_path):
    """T5's table of embeddings; a scale beside it is read for linear layers only."""
    tensors, seeded = {}, torch.Generator().manual_seed(0)
    shapes = {"shared": (64, 128), "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": (32, 4)}
    for block in range(2):
        inside = f"encoder.block.{block}.layer"
        shapes |= {f"{inside}.0.SelfAttention.{name}": (128, 128) for name in "qkvo"}
        shapes |= {f"{inside}.1.DenseReluDense.{name}": (256, 128) for name in ("wi_0", "wi_1")}
        shapes |= {f"{inside}.1.DenseReluDense.wo": (128, 256)}
        tensors |= {f"{inside}.{i}.layer_norm.weight": torch.ones(128).bfloat16() for i in (0, 1)}
    for layer, shape in shapes.items():
        weight = torch.randn(shape, generator=seeded) * 0.05
        scale = weight.abs().max() / 448
        tensors[f"{layer}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{layer}.scale_weight"] = scale
    tensors |= {"encoder.final_layer_norm.weight": torch.ones(128).bfloat16()}
    source, target = tmp_path / "t5.safetensors", tmp_path / "out.safetensors"
    save_file(tensors | {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}, source)
    before = decoded(source)
    convert(Request(source, target, INT8, Policy(keep=("relative_attention_bias", r"block\.1.*wo"))))
    written, read = load_file(target), as_comfyui_reads(target)
    for layer in ("shared", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"):
        assert written[f"{layer}.weight"].dtype == torch.bfloat16 and f"{layer}.comfy_quant" not in written
    assert written["encoder.block.1.layer.1.DenseReluDense.wo.weight"].dtype == torch.float8_e4m3fn
    assert all(relative_error(before[name], read[name]) < 0.02 for name in before)
    assert not verify_file(target, against=source).findings


@pytest.mark.parametrize("name", ["weight_scale", "scale_weight", "weight_scale_inv", "input_scale", "weight_scale_2"])
@pytest.mark.parametrize("fmt", ["int8_rowwise", "nvfp4", "float8_e4m3fn"])
def test_a_scale_beside_a_16_bit_weight_is_left_out_with_a_note(tmp_path, name, fmt):
    tensors, stray = truth(), [f"{layer}.{name}" for layer in (TAKEN[0], KEPT[0])]
    source, target = tmp_path / "stray.safetensors", tmp_path / "out.safetensors"
    save_file(tensors | {one: torch.tensor(0.02 if name != "weight_scale" else 1.0) for one in stray}, source)
    report = convert(Request(source, target, Recipe(get_format(fmt))))
    assert any("Left out: 2 scales" in str(warning) and stray[0] in str(warning) for warning in report.warnings)
    assert not verify_file(target, against=source).findings
    written = load_file(target)
    assert stray[1] not in written and f"{TAKEN[0]}.comfy_quant" in written
    if name not in ("weight_scale", "weight_scale_2"):
        assert stray[0] not in written
    read = as_comfyui_reads(target)
    assert all(relative_error(w.float(), read[n]) < WORST for n, w in tensors.items() if n.endswith("weight"))


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("lost.weight_scale", torch.tensor(1.0), "lost.weight_scale has no weight beside it"),
        ("img_in.pre_quant_scale", torch.full((256,), 2.0), "img_in.pre_quant_scale multiplies the inputs"),
        ("codes.weight_scale", torch.tensor(0.01), "codes.weight is BF16 and holds nothing but FP8 or INT8 codes"),
        ("cast.weight_scale_2", torch.tensor(0.01), "nothing in the file says what they stand for: cast.weight"),
    ],
)
def test_a_scale_that_may_serve_something_is_refused_before_any_work(tmp_path, name, tensor, words):
    codes = (torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 100).to(torch.float8_e4m3fn)
    source = tmp_path / "stray.safetensors"
    beside = {"codes": codes.bfloat16(), "cast": codes.view(torch.uint8)}.get(name.partition(".")[0])
    weights = {} if beside is None else {f"{name.partition('.')[0]}.weight": beside}
    save_file(truth() | weights | {name: tensor}, source)
    with open_source(source) as src, pytest.raises((PlanError, InputFileError), match=words):
        make_plan(src, Request(source, tmp_path / "out.safetensors", INT8))


def test_two_scales_of_one_layer_must_agree(tmp_path):
    source = legacy(tmp_path / "model.safetensors")
    tensors = load_file(source)
    doubled = {name.replace("scale_weight", "weight_scale"): t.clone() for name, t in tensors.items()}
    save_file(tensors | doubled, source)
    convert(Request(source, tmp_path / "out.safetensors", INT8))
    assert not verify_file(tmp_path / "out.safetensors", against=source).findings
    doubled["img_in.weight_scale"] *= 2
    save_file(tensors | doubled, source)
    with open_source(source) as src, pytest.raises(PlanError, match="img_in has two scales that differ"):
        make_plan(src, Request(source, tmp_path / "two.safetensors", INT8))
