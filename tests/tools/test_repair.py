"""Repair: every defect is found by its code and put right exactly; what has no exact answer is only reported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves the folder of the tests out
from comfyui_quantpress.cli.main import main  # noqa: E402
from comfyui_quantpress.quant_core.checkpoint.metadata import build_header_metadata, encode_config  # noqa: E402
from comfyui_quantpress.quant_core.checkpoint.source import open_source  # noqa: E402
from comfyui_quantpress.quant_core.errors import RequestError  # noqa: E402
from comfyui_quantpress.quant_core.formats import all_formats, get_format  # noqa: E402
from comfyui_quantpress.quant_core.numerics.metrics import relative_error  # noqa: E402
from comfyui_quantpress.quant_core.numerics.packing import unswizzle_scales  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.verify import check_file  # noqa: E402
from comfyui_quantpress.quant_core.tools.against import find_layout  # noqa: E402
from comfyui_quantpress.quant_core.tools.migrate import migrate  # noqa: E402
from comfyui_quantpress.quant_core.tools.repair import Repair, repair  # noqa: E402
from tool_files import (  # noqa: E402
    K,
    N,
    assert_untouched,
    bystanders,
    canonical_file,
    config_of,
    decoded,
    quantized,
    save,
    weight,
)

HEADER = "_quantization_metadata"
Tensors, Configs = dict[str, Tensor], dict[str, dict]


def raw(text: str | bytes) -> Tensor:
    return torch.frombuffer(bytearray(text if isinstance(text, bytes) else text.encode()), dtype=torch.uint8)


def repaired(source: Path, **options) -> tuple[Repair, Path]:
    target = source.with_name("repaired.safetensors")
    with open_source(source) as src:
        result = repair(src, **options)
        result.rewrite.apply(target, overwrite=True)
    return result, target


def nul(tensors: Tensors, configs: Configs, meta: dict) -> None:
    tensors["blocks.0.comfy_quant"] = raw(json.dumps(configs["blocks.0"]).encode() + b"\0\0\0")


def invalid_json(tensors: Tensors, configs: Configs, meta: dict) -> None:
    tensors["blocks.0.comfy_quant"] = raw(json.dumps(configs["blocks.0"])[:-3])


def signed_config(tensors: Tensors, configs: Configs, meta: dict) -> None:
    tensors["blocks.0.comfy_quant"] = encode_config(configs["blocks.0"]).view(torch.int8).reshape(1, -1)


def nested(tensors: Tensors, configs: Configs, meta: dict) -> None:
    told = dict(configs["blocks.0"])
    tensors["blocks.0.comfy_quant"] = raw(json.dumps({"format": told.pop("format"), "params": told}))
    meta[HEADER] = build_header_metadata({"blocks.1": configs["blocks.1"]})


def no_header(tensors: Tensors, configs: Configs, meta: dict) -> None:
    del meta[HEADER]


def broken_header(tensors: Tensors, configs: Configs, meta: dict) -> None:
    meta[HEADER] = meta[HEADER][:-4]


def header_lacks_a_layer(tensors: Tensors, configs: Configs, meta: dict) -> None:
    meta[HEADER] = build_header_metadata({"blocks.1": configs["blocks.1"]})


def header_with_prefix(tensors: Tensors, configs: Configs, meta: dict) -> None:
    meta[HEADER] = build_header_metadata(
        {f"model.diffusion_model.{layer}": config for layer, config in configs.items()}
    )


def header_names_a_stranger(tensors: Tensors, configs: Configs, meta: dict) -> None:
    meta[HEADER] = build_header_metadata({**configs, "gone": {"format": "nvfp4"}})


def header_contradicts_the_data(tensors: Tensors, configs: Configs, meta: dict) -> None:
    meta[HEADER] = build_header_metadata({**configs, "blocks.0": {"format": "asym_w4a8_int8", "group_size": 16}})


def header_only(tensors: Tensors, configs: Configs, meta: dict) -> None:
    del tensors["blocks.0.comfy_quant"]


def scales_under_a_prefix(tensors: Tensors, configs: Configs, meta: dict) -> None:
    for name in [n for n in tensors if n.startswith("blocks.") and not n.endswith((".weight", ".bias"))]:
        tensors[f"model.diffusion_model.{name}"] = tensors.pop(name)


def descriptions_under_a_prefix(tensors: Tensors, configs: Configs, meta: dict) -> None:
    for name in [n for n in tensors if n.startswith("blocks.") and not n.endswith((".weight", ".bias"))]:
        tensors[f"diffusion_model.{name}"] = tensors.pop(name)
    del meta[HEADER]


def orphan(tensors: Tensors, configs: Configs, meta: dict) -> None:
    tensors["final.weight_scale"] = torch.tensor(1.0)


def described_but_whole(tensors: Tensors, configs: Configs, meta: dict) -> None:
    tensors["final.comfy_quant"] = encode_config({"format": "float8_e4m3fn"})


COMMON = [
    (nul, "config-nul"),
    (invalid_json, "config-json"),
    (signed_config, "config-dtype"),
    (nested, "config-nested"),
    (no_header, "header-missing"),
    (broken_header, "header-json"),
    (header_lacks_a_layer, "header-incomplete"),
    (header_with_prefix, "header-prefix"),
    (header_names_a_stranger, "header-orphan"),
    (header_contradicts_the_data, "header-sync"),
    (header_only, "config-tensor-missing"),
    (orphan, "orphan"),
    (described_but_whole, "not-quantized"),
    (scales_under_a_prefix, "tensor-prefix"),
    (descriptions_under_a_prefix, "tensor-prefix"),
]


def damaged(path: Path, name: str, damage: Callable[[Tensors, Configs, dict], None]) -> Path:
    tensors, configs = quantized(get_format(name))
    tensors = {
        **tensors,
        **{f"{layer}.comfy_quant": encode_config(config) for layer, config in configs.items()},
        **bystanders(),
    }
    meta = {HEADER: build_header_metadata(configs)}
    damage(tensors, configs, meta)
    return save(path, tensors, metadata=meta)


@pytest.mark.parametrize("name", ["nvfp4", "int8_lodewise"])
@pytest.mark.parametrize(("damage", "code"), COMMON)
def test_damaged_metadata_is_found_and_put_right(tmp_path, name, damage, code):
    good = canonical_file(tmp_path / "good.safetensors", name)
    source = damaged(tmp_path / "bad.safetensors", name, damage)
    result, target = repaired(source)
    assert code in {finding.code for finding in result.findings} and not result.unfixed
    assert not check_file(target).findings
    with open_source(good) as one, open_source(target) as two:
        assert {n: (i.dtype, i.shape) for n, i in one.tensors.items()} == {
            n: (i.dtype, i.shape) for n, i in two.tensors.items()
        }
        assert all(torch.equal(one.read_bytes(n), two.read_bytes(n)) for n in one.tensors)
        assert json.loads(one.metadata[HEADER]) == json.loads(two.metadata[HEADER])
        assert repair(two).rewrite.changes() == ()
    touched = {"blocks.0.comfy_quant", "final.weight_scale", "final.comfy_quant"}
    with open_source(source) as src:
        touched |= {name for name in src.tensors if "diffusion_model." in name}
    assert_untouched(source, target, touched)


def bf16_scale(t: Tensors) -> None:
    t["blocks.0.weight_scale"] = t["blocks.0.weight_scale"].bfloat16()


def one_element(key: str) -> Callable[[Tensors], None]:
    def damage(t: Tensors) -> None:
        t[f"blocks.0.{key}"] = t[f"blocks.0.{key}"].reshape(1)

    return damage


def as_uint8(t: Tensors) -> None:
    t["blocks.0.weight_scale"] = t["blocks.0.weight_scale"].view(torch.uint8)


def as_e8m0(t: Tensors) -> None:
    t["blocks.0.weight_scale"] = t["blocks.0.weight_scale"].view(torch.float8_e8m0fnu)


def in_row_order(columns: int) -> Callable[[Tensors], None]:
    def damage(t: Tensors) -> None:
        for layer in ("blocks.0", "blocks.1"):
            t[f"{layer}.weight_scale"] = unswizzle_scales(t[f"{layer}.weight_scale"], N, K // columns)

    return damage


def input_scale(t: Tensors) -> None:
    t["blocks.0.input_scale"] = torch.ones(1, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "damage", "code"),
    [
        ("float8_e4m3fn", bf16_scale, "scale-dtype"),
        ("int8_blockwise", bf16_scale, "scale-dtype"),
        ("float8_e4m3fn", one_element("weight_scale"), "scale-rank"),
        ("nvfp4", one_element("weight_scale_2"), "scale-rank"),
        ("nvfp4", as_uint8, "scale-bytes"),
        ("mxfp8", as_e8m0, "scale-bytes"),
        ("float8_e4m3fn", input_scale, "scale-dtype"),
    ],
)
def test_scales_of_another_dtype_or_rank(tmp_path, name, damage, code):
    tensors, configs = quantized(get_format(name))
    damage(tensors)
    source = save(tmp_path / "bad.safetensors", {**tensors, **bystanders()}, configs)
    result, target = repaired(source)
    assert code in {finding.code for finding in result.findings} and not result.unfixed
    assert not check_file(target).errors
    one, two = decoded(source), decoded(target)
    assert all(torch.equal(one[layer], two[layer]) for layer in two)
    touched = {f"blocks.0.{s}" for s in ("weight_scale", "weight_scale_2", "input_scale")}
    assert_untouched(source, target, touched)


def narrow(fmt_name: str, rows: int) -> tuple[Tensors, Configs, Tensor]:
    fmt = get_format(fmt_name)
    w = torch.randn(rows, K, generator=torch.Generator().manual_seed(1)) * 0.1
    return (
        {f"blocks.0.{s}": t for s, t in fmt.quantize(w).items()},
        {"blocks.0": fmt.config(tuple(w.shape), w.dtype)},
        fmt.dequantize(fmt.quantize(w), tuple(w.shape)),
    )


@pytest.mark.parametrize(("name", "columns"), [("nvfp4", 16), ("mxfp8", 32)])
def test_block_scales_in_row_order_are_seen_by_their_shape(tmp_path, name, columns):
    tensors, configs, expected = narrow(name, 96)  # 96 rows would be padded to 128
    good = tensors["blocks.0.weight_scale"]
    tensors["blocks.0.weight_scale"] = unswizzle_scales(good, 96, K // columns)
    others = {key: t for key, t in bystanders().items() if key != "blocks.0.bias"}
    source = save(tmp_path / "bad.safetensors", {**tensors, **others}, configs)
    result, target = repaired(source)
    assert [finding.code for finding in result.findings] == ["scale-unswizzled"]
    assert torch.equal(decoded(target)["blocks.0"], expected)
    with open_source(target) as src:
        assert torch.equal(src.read("blocks.0.weight_scale").view(torch.uint8), good.view(torch.uint8))


def test_block_scales_whose_shape_does_not_tell_are_reordered_on_request_only(tmp_path):
    tensors, configs = quantized(get_format("nvfp4"))
    expected = decoded(save(tmp_path / "good.safetensors", {**tensors, **bystanders()}, configs))
    in_row_order(16)(tensors)
    source = save(tmp_path / "bad.safetensors", {**tensors, **bystanders()}, configs)
    untouched, target = repaired(source)
    assert not untouched.findings and not untouched.rewrite.changes()
    _, target = repaired(source, unswizzled=True)
    assert all(torch.equal(expected[layer], w) for layer, w in decoded(target).items())
    with (
        open_source(canonical_file(tmp_path / "fp8.safetensors")) as src,
        pytest.raises(RequestError, match="NVFP4 or MXFP8"),
    ):
        repair(src, unswizzled=True)


def test_a_label_that_contradicts_the_scales_is_corrected(tmp_path):
    """As converters wrote it that fell back to row scales and kept the label of block scales."""
    tensors, configs = quantized(get_format("float8_e4m3fn_rowwise"), full_precision_matrix_mult=True)
    told = {
        layer: {**config, "format": "float8_e4m3fn_blockwise", "group_size": 128} for layer, config in configs.items()
    }
    source = save(tmp_path / "bad.safetensors", {**tensors, **bystanders()}, told)
    result, target = repaired(source)
    assert {finding.code for finding in result.findings} == {"config-format"} and not result.unfixed
    assert config_of(target, "blocks.0") == configs["blocks.0"]
    assert not check_file(target).findings


@pytest.mark.parametrize("assume", ["int8_rowwise", "int8_convrot", "nvfp4"])
def test_what_the_file_does_not_tell_is_told_by_the_user(tmp_path, assume):
    tensors, configs = quantized(get_format(assume))
    source = save(tmp_path / "bad.safetensors", {**tensors, **bystanders()})
    silent, _ = repaired(source)
    assert {finding.code for finding in silent.unfixed} >= {"unknown-format"} and not silent.rewrite.changes()
    result, target = repaired(source, assume=assume)
    assert not result.unfixed and config_of(target, "blocks.0") == configs["blocks.0"]
    assert not check_file(target).findings
    with open_source(source) as src, pytest.raises(RequestError, match="no format"):
        repair(src, assume="nvfp5")


def test_a_broken_description_still_tells_whose_order_the_scales_have(tmp_path):
    """NVFP4 shapes often fit ComfyUI's and ModelOpt's order; only one of the two writes comfy_quant at all."""
    good = canonical_file(tmp_path / "good.safetensors", "nvfp4")

    def damage(tensors, configs, meta):
        invalid_json(tensors, configs, meta)
        no_header(tensors, configs, meta)

    result, target = repaired(damaged(tmp_path / "bad.safetensors", "nvfp4", damage))
    assert {finding.code for finding in result.findings} == {
        "config-json",
        "config-missing",
        "header-missing",
    } and not result.unfixed
    with open_source(good) as one, open_source(target) as two:
        assert one.tensors.keys() == two.tensors.keys()
        assert all(torch.equal(one.read_bytes(name), two.read_bytes(name)) for name in one.tensors)


def test_a_description_without_format_is_said_of_the_tensor_and_of_the_header(tmp_path):
    good = canonical_file(tmp_path / "good.safetensors", "float8_e4m3fn")

    def damage(tensors, configs, meta):
        tensors["blocks.0.comfy_quant"] = raw(json.dumps({"note": 1}))
        meta[HEADER] = json.dumps({"format_version": "1.0", "layers": {**configs, "blocks.0": {"note": 1}}})

    result, target = repaired(damaged(tmp_path / "bad.safetensors", "float8_e4m3fn", damage))
    said = {finding.code: finding.message for finding in result.findings}
    assert said.keys() == {"config-json", "config-format"} and not result.unfixed
    assert said["config-format"].startswith("blocks.0: its description in the header has no format. Its tensors are")
    assert not any(str(tmp_path) in message for message in said.values())
    assert config_of(target, "blocks.0") == config_of(good, "blocks.0")


def test_a_header_that_says_less_is_completed(tmp_path):
    """As convert_to_quant 1.3.1 wrote it: per_row in the tensors only."""
    tensors, configs = quantized(get_format("int8_convrot"))
    tensors |= {f"{layer}.comfy_quant": encode_config(config) for layer, config in configs.items()}
    less = {
        layer: {key: value for key, value in config.items() if key != "per_row"} for layer, config in configs.items()
    }
    source = save(
        tmp_path / "a.safetensors", {**tensors, **bystanders()}, metadata={HEADER: build_header_metadata(less)}
    )
    result, target = repaired(source)
    assert {finding.code for finding in result.findings} == {"header-sync"} and not check_file(target).findings
    assert_untouched(source, target)
    assert config_of(target, "blocks.0") == configs["blocks.0"]
    with open_source(source) as src:
        migrate(src).apply(tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == target.read_bytes()


def test_migration_adds_what_other_writers_leave_out_and_repair_does_not(tmp_path):
    tensors, configs = quantized(get_format("int8_rowwise"))
    less = {layer: {"format": "int8_tensorwise"} for layer in configs}
    source = save(tmp_path / "a.safetensors", {**tensors, **bystanders()}, less)
    with open_source(source) as src:
        assert repair(src).findings == () and repair(src).rewrite.changes() == ()
        migrate(src).apply(tmp_path / "m.safetensors")
    assert config_of(tmp_path / "m.safetensors", "blocks.1") == configs["blocks.1"]


def plain(path: Path) -> Path:
    return save(path, {f"blocks.{i}.weight": weight(i) for i in range(2)})


@pytest.mark.parametrize(
    ("name", "described", "row_order", "expected"),
    [
        ("nvfp4", True, False, (None, False)),
        ("nvfp4", True, True, (None, True)),
        ("nvfp4", False, False, ("nvfp4", False)),
        ("nvfp4", False, True, ("nvfp4", True)),
        ("mxfp8", True, True, (None, True)),
        ("int8_rowwise", False, False, ("int8_rowwise", False)),
        ("int8_convrot", False, False, ("int8_convrot", False)),
    ],
)
def test_the_source_tells_the_layout_that_the_file_does_not(tmp_path, name, described, row_order, expected):
    tensors, configs = quantized(get_format(name))
    if row_order:
        in_row_order(16 if name == "nvfp4" else 32)(tensors)
    bad = save(tmp_path / "bad.safetensors", {**tensors, **bystanders()}, configs if described else None)
    with open_source(bad) as src, open_source(plain(tmp_path / "plain.safetensors")) as reference:
        layout = find_layout(src, reference)
        assert (layout.assume, layout.unswizzled) == expected and layout.error < 0.12
    code = main(
        ["repair", str(bad), str(tmp_path / "good.safetensors"), "--against", str(tmp_path / "plain.safetensors")]
    )
    sound, good = described and not row_order, tmp_path / "good.safetensors"
    assert code == 0 and good.exists() is not sound  # a sound file is not copied
    assert not check_file(bad if sound else good).errors
    got = decoded(bad if sound else good)
    assert all(relative_error(weight(i), got[f"blocks.{i}"]) < 0.12 for i in range(2))


def test_modelopt_order_is_found_by_the_source(tmp_path):
    tensors, _ = quantized(get_format("nvfp4"))
    in_row_order(16)(tensors)
    for i in range(2):
        packed = tensors[f"blocks.{i}.weight"]
        tensors[f"blocks.{i}.weight"] = (packed << 4) | (packed >> 4)
    bad = save(tmp_path / "bad.safetensors", {**tensors, **bystanders()})
    with open_source(bad) as src, open_source(plain(tmp_path / "plain.safetensors")) as reference:
        assert find_layout(src, reference).assume == "modelopt"


def test_another_model_tells_nothing(tmp_path):
    bad = canonical_file(tmp_path / "bad.safetensors", "nvfp4")
    other = save(tmp_path / "other.safetensors", {f"blocks.{i}.weight": weight(i + 50) for i in range(2)})
    stranger = save(tmp_path / "stranger.safetensors", {"else.weight": weight(0)})
    with open_source(bad) as src, open_source(other) as one, open_source(stranger) as two:
        with pytest.raises(RequestError, match="no layout decodes near"):
            find_layout(src, one)
        with pytest.raises(RequestError, match="shares no layer"):
            find_layout(src, two)


def test_damage_without_an_exact_answer_is_reported_and_left(tmp_path):
    tensors, configs = quantized(get_format("float8_e4m3fn"))
    tensors["blocks.0.weight_scale"] = torch.tensor(float("nan"))
    tensors["final.weight_scale"] = torch.tensor(0.25)
    configs["final"] = {"format": "float8_e4m3fn"}
    configs["lost"] = {"format": "float8_e4m3fn"}
    source = save(
        tmp_path / "bad.safetensors",
        {**tensors, **bystanders(), "far.weight_scale": torch.ones(())},
        configs,
        header=False,
    )
    result, target = repaired(source)
    assert {finding.code for finding in result.unfixed} == {"scale-value", "not-quantized", "weight-missing", "orphan"}
    assert_untouched(source, target)


@pytest.mark.parametrize("name", [fmt.name for fmt in all_formats()])
def test_a_sound_file_has_no_findings(tmp_path, name):
    with open_source(canonical_file(tmp_path / "a.safetensors", name)) as src:
        result = repair(src)
        assert result.findings == () and result.rewrite.changes() == ()
