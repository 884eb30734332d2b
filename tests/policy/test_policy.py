"""Recipes for single layers: rules, the layer-config file, its template, and the older tool's filters."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(
    0, str(Path(__file__).parents[1] / "tools")
)  # pytest's importlib mode leaves the folder of the tests out
from comfyui_quantpress.quant_core.checkpoint.source import open_source  # noqa: E402
from comfyui_quantpress.quant_core.errors import InputFileError, PlanError, RequestError  # noqa: E402
from comfyui_quantpress.quant_core.formats import get_format  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.layer_plan import Quantized  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.plan import make_plan  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.request import Request  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.run import convert  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.verify import check_file  # noqa: E402
from comfyui_quantpress.quant_core.policy.general import Policy, Rule  # noqa: E402
from comfyui_quantpress.quant_core.policy.layer_config import format_for, load_layer_config, specificity, template  # noqa: E402
from comfyui_quantpress.quant_core.policy.presets import AVOID, PRESETS, keep_patterns  # noqa: E402
from comfyui_quantpress.quant_core.policy.recipe import Recipe  # noqa: E402
from tool_files import config_of, save, weight  # noqa: E402

LAYERS = ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.1.mlp.fc1", "final_layer.linear")
BASE = Recipe(get_format("int8_rowwise"))


def model(path: Path) -> Path:
    return save(path, {f"{layer}.weight": weight(i) for i, layer in enumerate(LAYERS)})


def formats(path: Path, policy: Policy, recipe: Recipe = BASE) -> dict[str, str | None]:
    with open_source(path) as src:
        plan = make_plan(src, Request(src.path, Path("planned"), recipe, policy))
    return {layer.layer: layer.recipe.format.name if isinstance(layer, Quantized) else None for layer in plan.layers}


def test_the_first_rule_wins_over_keep_only_and_name_rules(tmp_path):
    path = model(tmp_path / "m.safetensors")
    fp8, nvfp4 = Recipe(get_format("float8_e4m3fn")), Recipe(get_format("nvfp4"))
    policy = Policy(
        keep=("attn",), rules=(Rule(r"blocks\.1\.attn", fp8), Rule("attn|final", nvfp4), Rule("fc1", None))
    )
    assert formats(path, policy) == {
        "blocks.0.attn.qkv": "nvfp4",
        "blocks.0.mlp.fc1": None,
        "blocks.1.attn.qkv": "float8_e4m3fn",
        "blocks.1.mlp.fc1": None,
        "final_layer.linear": "nvfp4",
    }


def test_a_rule_s_recipe_and_keys_reach_the_file(tmp_path):
    source, target = model(tmp_path / "m.safetensors"), tmp_path / "q.safetensors"
    rule = Rule(r"\.0\.attn", Recipe(get_format("float8_e4m3fn")), {"full_precision_matrix_mult": True})
    convert(Request(source, target, BASE, Policy(rules=(rule,)), device="cpu"))
    assert config_of(target, LAYERS[0]) == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert config_of(target, LAYERS[2])["format"] == "int8_tensorwise"
    assert not check_file(target).findings
    with open_source(target) as src:
        recorded = json.loads(src.metadata["quantpress"])["policy"]["rules"]
    assert recorded == [rule.describe()]


def test_a_rule_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(PlanError, match="rules 'nowhere' matches none"):
        formats(model(tmp_path / "m.safetensors"), Policy(rules=(Rule("nowhere", None),)))


def config(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_layer_config_gives_each_layer_its_recipe(tmp_path):
    loaded = load_layer_config(
        config(
            tmp_path / "c.json",
            {
                "_default": {"format": "float8_e4m3fn", "scaling_mode": "row"},
                "_exclusions": ["x"],
                "attn": {"format": "nvfp4"},
                r"blocks\.1\.attn": {"format": "int8_blockwise", "block_size": 64, "simple": True},
                r"\.0\.mlp": {"skip": True},
            },
        ),
        BASE,
    )
    assert loaded.default.format.name == "float8_e4m3fn_rowwise"
    assert [rule.pattern for rule in loaded.rules] == [r"blocks\.1\.attn", r"\.0\.mlp", "attn"]
    assert loaded.rules[0].recipe.format.group_size == 64 and loaded.rules[0].recipe.rounding.name == "nearest"
    got = formats(model(tmp_path / "m.safetensors"), Policy(rules=loaded.rules), loaded.default)
    assert got == {
        "blocks.0.attn.qkv": "nvfp4",
        "blocks.0.mlp.fc1": None,
        "blocks.1.attn.qkv": "int8_blockwise",
        "blocks.1.mlp.fc1": "float8_e4m3fn_rowwise",
        "final_layer.linear": None,
    }


def test_specific_patterns_come_before_general_ones():
    ordered = [r"double_blocks\.0\.img_attn", r"blocks\.12", "transformer_blocks_attention", "attn", "a.*b", r"\d+"]
    assert sorted(reversed(ordered), key=specificity, reverse=True) == ordered


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"attn": {"format": ""}}, 'attn.*`format` is ""'),
        ({"attn": {"format": "fp9"}}, "fp9"),
        ({"(": {"skip": True}}, "regular"),
        ({"attn": {"fromat": "nvfp4"}}, "no setting 'fromat'"),
        ({"attn": "nvfp4"}, "object of settings"),
        ({"attn": {"format": "fp8", "scaling_mode": "rows"}}, "scaling mode"),
        ({"attn": {"format": "int8_blockwise", "block_size": "64"}}, "a number is needed"),
        ({"attn": {"format": "int8_blockwise", "block_size": 65}}, "65"),
        ({"attn": {}, "mlp": {}}, "2 problems"),
    ],
)
def test_bad_entries_are_named(tmp_path, content, message):
    with pytest.raises(PlanError, match=message):
        load_layer_config(config(tmp_path / "c.json", content), BASE)


def test_what_is_no_json_is_refused(tmp_path):
    for text in ('{"a": 1, "a": 2}', "[]", "nonsense"):
        with pytest.raises(InputFileError, match="c.json"):
            load_layer_config(config(tmp_path / "c.json", text), BASE)
    with pytest.raises(InputFileError, match="cannot be read"):
        load_layer_config(tmp_path / "none.json", BASE)


def test_the_template_names_every_layer_and_is_refused_until_filled(tmp_path):
    text = template({layer: (256, 256) for layer in LAYERS})
    with pytest.raises(PlanError, match=f"{len(LAYERS)} problems"):
        load_layer_config(config(tmp_path / "c.json", text), BASE)
    filled = config(tmp_path / "c.json", text.replace('"format": ""', '"format": "nvfp4"'))
    assert set(
        formats(model(tmp_path / "m.safetensors"), Policy(rules=load_layer_config(filled, BASE).rules)).values()
    ) == {"nvfp4"}


@pytest.mark.parametrize(
    ("name", "mode", "size", "expected"),
    [
        ("fp8", None, None, "float8_e4m3fn"),
        ("fp8", "block2d", 64, "float8_e4m3fn_blockwise"),
        ("int8", "row", None, "int8_rowwise"),
        ("nf4", None, 128, "bnb_nf4"),
        ("mxfp8", "block", 128, "mxfp8"),
        ("float8_e4m3fn_block3d", None, 64, "float8_e4m3fn_block3d"),
    ],
)
def test_older_words_for_formats(name, mode, size, expected):
    fmt = format_for(name, mode, size)
    assert fmt.name == expected and (not fmt.group_sizes or size in (None, fmt.group_size))


def test_every_filter_is_there_and_keeps_only_what_occurs():
    assert len(PRESETS) == 23 and PRESETS["mistral"].keep == AVOID
    layers = ["model.layers.0.mlp", "blocks.0.head.head", "lm_head", "blocks.1.attn"]
    assert keep_patterns(["wan", "qwen35"], layers) == (r"\.layers\.0\.", r"head\.head", "lm_head")
    assert keep_patterns(["generic_text"], layers) == ()
    with pytest.raises(RequestError, match="no model filter 'fluxx'"):
        keep_patterns(["fluxx"], layers)
