"""Migration: every legacy form becomes comfy_quant, decodes to the same weights, and loses nothing on the way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves the folder of the tests out
from comfyui_quantpress.quant_core.checkpoint.source import open_source  # noqa: E402
from comfyui_quantpress.quant_core.errors import InputFileError, PlanError, Remedy, RequestError  # noqa: E402
from comfyui_quantpress.quant_core.formats import all_formats, get_format  # noqa: E402
from comfyui_quantpress.quant_core.numerics.packing import unswizzle_scales  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.compare import verify_file  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.verify import check_file  # noqa: E402
from comfyui_quantpress.quant_core.stored.layers import stored_layers  # noqa: E402
from comfyui_quantpress.quant_core.tools.canonicalize import InputScale  # noqa: E402
from comfyui_quantpress.quant_core.tools.merge import split  # noqa: E402
from comfyui_quantpress.quant_core.tools.migrate import MigrateOptions, migrate  # noqa: E402
from comfyui_quantpress.quant_core.tools.to_legacy import to_legacy  # noqa: E402
from tool_files import (  # noqa: E402
    K,
    N,
    as_bytes,
    assert_untouched,
    bystanders,
    canonical_file,
    config_of,
    decoded,
    quantized,
    save,
    weight,
)

ALL = [fmt.name for fmt in all_formats()]
LEGACY = [
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fn_rowwise",
    "float8_e4m3fn_blockwise",
    "float8_e4m3fn_block3d",
    "int8_tensorwise",
    "int8_rowwise",
    "int8_blockwise",
    "int8_lodewise",
]


def legacy_file(path: Path, name: str, marker: int | None = 0, scale_input: bool = False, prefix: str = "") -> Path:
    """An fp8_scaled or legacy INT8 file with two layers, and a dummy scale beside a 16-bit weight."""
    tensors, _ = quantized(get_format(name))
    old = {
        key.replace(".weight_scale", ".scale_weight").replace(".input_scale", ".scale_input"): t
        for key, t in tensors.items()
    }
    old["final.scale_weight"] = torch.ones(())
    if scale_input:
        old |= {"blocks.0.scale_input": torch.tensor([0.5]), "final.scale_input": torch.ones(())}
    if marker is not None:
        old["scaled_fp8"] = torch.zeros(marker).to(torch.float8_e4m3fn)
    return save(path, {prefix + key: t for key, t in {**old, **bystanders()}.items()})


def migrated(source: Path, options: MigrateOptions | None = None) -> Path:
    target = source.with_name(source.stem + "_new.safetensors")
    with open_source(source) as src:
        migrate(src, options or MigrateOptions()).apply(target, overwrite=True)
    return target


def assert_same_weights(before: Path, after: Path) -> None:
    one, two = decoded(before), decoded(after)
    assert one.keys() == two.keys() and one
    for layer in one:
        assert torch.equal(one[layer], two[layer]), layer


def assert_second_time_changes_nothing(path: Path) -> None:
    with open_source(path) as src:
        assert migrate(src).changes() == ()
    again = migrated(path)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ALL)
def test_a_canonical_file_is_left_alone(tmp_path, name):
    path = canonical_file(tmp_path / "a.safetensors", name)
    with open_source(path) as src:
        assert migrate(src).changes() == ()


@pytest.mark.parametrize("name", LEGACY)
@pytest.mark.parametrize("scale_input", [False, True])
def test_legacy_scales_become_comfy_quant(tmp_path, name, scale_input):
    source = legacy_file(tmp_path / "old.safetensors", name, scale_input=scale_input)
    target = migrated(source)
    tensors, configs = quantized(get_format(name))
    assert not check_file(target).errors
    assert_same_weights(source, target)
    own = {
        key for key in open_names(source) if key.startswith(("blocks.0.", "blocks.1.")) and not key.endswith(".bias")
    }
    assert_untouched(source, target, own | {"final.scale_weight", "final.scale_input", "scaled_fp8"})
    assert "final.scale_weight" not in open_names(target) and "scaled_fp8" not in open_names(target)
    assert config_of(target, "blocks.0") == configs["blocks.0"]
    with open_source(target) as src:
        for key, tensor in tensors.items():
            stored = src.read(key)
            assert stored.dtype == tensor.dtype and stored.shape == tensor.shape, key
            if not (scale_input and key.endswith("input_scale")):
                assert torch.equal(as_bytes(stored), as_bytes(tensor)), key
        if scale_input:
            assert src.read("blocks.0.input_scale").shape == () and float(src.read("blocks.0.input_scale")) == 0.5
    assert_second_time_changes_nothing(target)


def open_names(path: Path) -> set[str]:
    with open_source(path) as src:
        return set(src.tensors)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("float8_e4m3fn", (1,)),
        ("float8_e4m3fn", (1, 1)),
        ("float8_e4m3fn_rowwise", (N, 1)),
        ("int8_rowwise", (N,)),
        ("float8_e4m3fn_block3d", (N, K // 128)),
        ("int8_tensorwise", (1,)),
    ],
)
def test_scales_of_another_rank_are_normalised(tmp_path, name, shape):
    fmt = get_format(name)
    tensors, configs = quantized(fmt)
    other = {key: t.reshape(shape) if key.endswith("weight_scale") else t for key, t in tensors.items()}
    source = save(tmp_path / "odd.safetensors", {**other, **bystanders()}, configs)
    target = migrated(source)
    good = save(tmp_path / "good.safetensors", {**tensors, **bystanders()}, configs)
    with open_source(target) as got, open_source(good) as want:
        assert {n: (i.dtype, i.shape) for n, i in got.tensors.items()} == {
            n: (i.dtype, i.shape) for n, i in want.tensors.items()
        }
    assert_same_weights(good, target)


@pytest.mark.parametrize(("marker", "expected"), [(0, None), (1, None), (2, True)])
def test_marker_of_two_means_full_precision_as_comfyui_reads_it(tmp_path, marker, expected):
    target = migrated(legacy_file(tmp_path / "old.safetensors", "float8_e4m3fn", marker))
    assert config_of(target, "blocks.0").get("full_precision_matrix_mult") is expected


def test_full_precision_can_be_set_and_removed(tmp_path):
    source = legacy_file(tmp_path / "old.safetensors", "float8_e4m3fn", 2)
    without = migrated(source, MigrateOptions(full_precision_matrix_mult=False))
    assert "full_precision_matrix_mult" not in config_of(without, "blocks.1")
    with_it = migrated(without, MigrateOptions(full_precision_matrix_mult=True))
    assert config_of(with_it, "blocks.1")["full_precision_matrix_mult"] is True


def test_hp_filter_names_the_quantized_layers(tmp_path):
    source = legacy_file(tmp_path / "old.safetensors", "float8_e4m3fn")
    migrated(source, MigrateOptions(hp_filter="^final"))
    with open_source(source) as src:
        with pytest.raises(PlanError, match=r"blocks\.0 must be in high precision.*float8_e4m3fn"):
            migrate(src, MigrateOptions(hp_filter=r"blocks\.0"))
        with pytest.raises(PlanError, match="finds no weight"):
            migrate(src, MigrateOptions(hp_filter="nowhere"))
        with pytest.raises(RequestError, match="not a regular expression"):
            migrate(src, MigrateOptions(hp_filter="("))


@pytest.mark.parametrize("wanted", [InputScale.UNIT, InputScale.WEIGHT])
def test_input_scale_is_added_on_demand_and_an_old_one_kept(tmp_path, wanted):
    source = legacy_file(tmp_path / "old.safetensors", "float8_e4m3fn", scale_input=True)
    target = migrated(source, MigrateOptions(input_scale=wanted))
    with open_source(target) as src:
        assert float(src.read("blocks.0.input_scale")) == 0.5
        added = src.read("blocks.1.input_scale")
        assert added.shape == () and added.dtype == torch.float32
        assert float(added) == (1.0 if wanted is InputScale.UNIT else float(src.read("blocks.1.weight_scale")))
        assert "final.input_scale" not in src.tensors


@given(
    params=st.dictionaries(
        st.sampled_from(["group_size", "note", "full_precision_matrix_mult"]),
        st.sampled_from([128, True, "x ✓"]),
        max_size=3,
    ),
    pad=st.integers(0, 5),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nested_params_and_padding_are_flattened(tmp_path, params, pad):
    params["group_size"] = 128
    tensors, _ = quantized(get_format("int8_blockwise"))
    raw = json.dumps({"format": "int8_blockwise", "params": params}).encode() + b"\0" * pad
    for layer in ("blocks.0", "blocks.1"):
        tensors[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    source = save(tmp_path / "nested.safetensors", {**tensors, **bystanders()})
    target = migrated(source)
    assert config_of(target, "blocks.0") == {"format": "int8_blockwise", **params}
    assert not check_file(target).findings
    assert_untouched(source, target, {"blocks.0.comfy_quant", "blocks.1.comfy_quant"})
    assert_second_time_changes_nothing(target)


def test_header_only_metadata_becomes_tensors_too(tmp_path):
    tensors, configs = quantized(get_format("nvfp4"))
    header = json.dumps({"format_version": "1.0", "layers": configs})
    source = save(
        tmp_path / "header.safetensors", {**tensors, **bystanders()}, metadata={"_quantization_metadata": header}
    )
    target = migrated(source)
    assert config_of(target, "blocks.1") == configs["blocks.1"]
    assert_untouched(source, target, header=set())  # the header's own text stays, too
    assert_same_weights(source, target)


def test_older_comfy_4bit_structure_is_read(tmp_path):
    for name in ("bnb_nf4", "bnb_fp4", "bnb_af4"):
        fmt = get_format(name)
        tensors, configs = quantized(fmt)
        old, told = {}, {}
        for layer, config in configs.items():
            old[f"{layer}.weight"] = tensors[f"{layer}.weight"].reshape(-1, 1)
            old[f"{layer}.absmax"] = tensors[f"{layer}.weight_scale"].reshape(-1)
            told[layer] = {**config, "quant_map": fmt.codebook().tolist()}
        source = save(tmp_path / f"{name}.safetensors", {**old, **bystanders()}, told)
        target = migrated(source)
        good = save(tmp_path / f"{name}_good.safetensors", {**tensors, **bystanders()}, configs)
        assert_same_weights(good, source)
        assert_same_weights(good, target)
        assert not check_file(target).findings
        assert config_of(target, "blocks.0") == configs["blocks.0"]
        assert_second_time_changes_nothing(target)


def test_hybrid_mxfp8_loses_only_its_extra_number(tmp_path):
    tensors, configs = quantized(get_format("mxfp8"))
    told = {layer: {**config, "format": "hybrid_mxfp8", "group_size": 32} for layer, config in configs.items()}
    extra = {f"{layer}.weight_scalar": torch.tensor(0.25) for layer in configs}
    source = save(tmp_path / "hybrid.safetensors", {**tensors, **extra, **bystanders()}, told)
    target = migrated(source)
    assert config_of(target, "blocks.0")["format"] == "mxfp8"
    assert_same_weights(source, target)
    assert_untouched(source, target, set(extra) | {f"{layer}.comfy_quant" for layer in configs})
    assert not check_file(target).findings


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e4m3fn_rowwise", "int8_lodewise", "mxfp8"])
def test_scales_without_any_metadata_are_recognised(tmp_path, name):
    tensors, configs = quantized(get_format(name))
    source = save(tmp_path / "bare.safetensors", {**tensors, **bystanders()})
    target = migrated(source)
    assert config_of(target, "blocks.0") == configs["blocks.0"]
    assert_untouched(source, target)


def test_what_the_shapes_do_not_tell_is_refused_with_the_remedy(tmp_path):
    for name, other in (("int8_rowwise", "int8_convrot"), ("nvfp4", "modelopt")):
        tensors, _ = quantized(get_format(name))
        source = save(tmp_path / f"{name}.safetensors", {**tensors, **bystanders()})
        with open_source(source) as src, pytest.raises(InputFileError, match=other) as refused:
            migrate(src)
        problem = refused.value.problems[0]
        assert (problem.setting, problem.remedy) == ("assume", Remedy.SAY_FORMAT) and name in problem.text


def test_transformers_block_scales_are_read(tmp_path):
    tensors, configs = quantized(get_format("float8_e4m3fn_blockwise"))
    other = {key.replace("weight_scale", "weight_scale_inv"): t for key, t in tensors.items()}
    source = save(tmp_path / "hf.safetensors", {**other, **bystanders()})
    target = migrated(source)
    assert config_of(target, "blocks.0") == configs["blocks.0"] and "blocks.0.weight_scale_inv" not in open_names(
        target
    )
    assert_same_weights(source, target)


@pytest.mark.parametrize("n", [256, 200])
def test_modelopt_nvfp4_is_reordered_exactly(tmp_path, n):
    """The even column in the low nibble and scales in row order; the JSON beside the file says who wrote it."""
    fmt, w = get_format("nvfp4"), weight(3, n)
    tensors = fmt.quantize(w)
    packed = tensors["weight"][:n]
    plain = unswizzle_scales(tensors["weight_scale"], n, K // 16)
    others = {key: t for key, t in bystanders().items() if key != "blocks.0.bias"}
    source = save(
        tmp_path / "export.safetensors",
        {
            "blocks.0.weight": (packed << 4) | (packed >> 4),
            "blocks.0.weight_scale": plain,
            "blocks.0.weight_scale_2": tensors["weight_scale_2"],
            "blocks.0.input_scale": torch.tensor(0.01),
            **others,
        },
    )
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}}))
    target = migrated(source)
    (tmp_path / "hf_quant_config.json").unlink()  # the new file explains itself
    assert torch.equal(decoded(target)["blocks.0"], fmt.dequantize(tensors, tuple(w.shape)))
    assert {finding.code for finding in check_file(target).errors} <= ({"kernel-refuses"} if n == 200 else set())
    with open_source(target) as src:
        for suffix, tensor in tensors.items():
            assert torch.equal(as_bytes(src.read(f"blocks.0.{suffix}")), as_bytes(tensor)), suffix


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_there_and_back_again(tmp_path, prefix):
    source = legacy_file(tmp_path / "old.safetensors", "float8_e4m3fn", 0, prefix=prefix)
    target = migrated(source)
    back = tmp_path / "back.safetensors"
    with open_source(target) as src:
        to_legacy(src).apply(back)
    with open_source(source) as one, open_source(back) as two:
        dummy = prefix + "final.scale_weight"
        assert set(one.tensors) - {dummy} == set(two.tensors)
        for name in two.tensors:
            assert torch.equal(one.read_bytes(name), two.read_bytes(name)), name
        assert two.metadata == one.metadata


def test_to_legacy_refuses_what_has_no_legacy_form(tmp_path):
    source = canonical_file(tmp_path / "a.safetensors", "nvfp4")
    with open_source(source) as src, pytest.raises(PlanError, match="2 layers.*nvfp4"):
        to_legacy(src)
    mixed, configs = quantized(get_format("float8_e4m3fn"))
    configs["blocks.0"]["full_precision_matrix_mult"] = True
    source = save(tmp_path / "b.safetensors", {**mixed, **bystanders()}, configs)
    with open_source(source) as src, pytest.raises(PlanError, match="full_precision_matrix_mult"):
        to_legacy(src)


def test_plain_file_without_quantized_layers_is_unchanged(tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file({"a.weight": weight(0), "b.weight": weight(1).to(torch.float8_e4m3fn)}, path)
    with open_source(path) as src:
        assert stored_layers(src) == {} and migrate(src).changes() == ()


def test_legacy_files_are_verified_against_their_source(tmp_path):
    source = legacy_file(tmp_path / "old.safetensors", "float8_e4m3fn")
    plain = {**bystanders(), **{f"blocks.{i}.weight": weight(i) for i in range(2)}}
    report = verify_file(source, save(tmp_path / "plain.safetensors", plain))
    assert not report.errors and [check.format for check in report.layers] == ["float8_e4m3fn"] * 2
    assert all(0 < check.relative_error < 0.05 for check in report.layers)
    other = {**plain, "norm.weight": torch.zeros(7, dtype=torch.float16)}
    report = verify_file(source, save(tmp_path / "other.safetensors", other))
    assert [finding.code for finding in report.errors] == ["copy-differs"]


@pytest.mark.parametrize(
    ("name", "group", "rows"), [("nvfp4", 16, 208), ("mxfp8", 32, 224), ("nvfp4", 16, 256), ("mxfp8", 32, 256)]
)
def test_block_formats_of_convert_to_quant_are_read_as_they_are(tmp_path, name, group, rows):
    """Its JSON also tells group_size, orig_dtype and orig_shape."""
    fmt, w = get_format(name), weight(1, rows)
    tensors = {f"blocks.0.{suffix}": t for suffix, t in fmt.quantize(w).items()}
    told = {"format": name, "group_size": group, "orig_dtype": "torch.bfloat16", "orig_shape": [rows, K]}
    others = {key: t for key, t in bystanders().items() if key != "blocks.0.bias"}
    source = save(tmp_path / "a.safetensors", {**tensors, **others}, {"blocks.0": told})
    assert torch.equal(decoded(source)["blocks.0"], fmt.dequantize(fmt.quantize(w), (rows, K)))
    with open_source(source) as src:
        assert migrate(src).changes() == () and not check_file(source).findings


def test_shards_are_migrated_into_one_file(tmp_path):
    source = legacy_file(tmp_path / "old.safetensors", "float8_e4m3fn")
    with open_source(source) as src:
        assert len(split(src, tmp_path / "s.safetensors.index.json", 90_000)) == 2
    with open_source(tmp_path / "s.safetensors.index.json") as src:
        migrate(src).apply(tmp_path / "joined.safetensors")
    whole = migrated(source)  # only the order of the tensors differs
    assert open_names(whole) == open_names(tmp_path / "joined.safetensors")
    assert_untouched(whole, tmp_path / "joined.safetensors")
    assert not check_file(tmp_path / "joined.safetensors").findings
