"""`quantpress compat`: each option of the older tool is taken, does what it says or is named; our commands run."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(
    0, str(Path(__file__).parents[1] / "tools")
)  # pytest's importlib mode leaves the folder of the tests out
from comfyui_quantpress.cli.compat.options import HELP_FLAGS, OPTIONS, SECTIONS  # noqa: E402
from comfyui_quantpress.cli.compat.translate import translate  # noqa: E402
from comfyui_quantpress.cli.main import main  # noqa: E402
from comfyui_quantpress.quant_core.checkpoint.source import open_source  # noqa: E402
from comfyui_quantpress.quant_core.errors import RequestError  # noqa: E402
from comfyui_quantpress.quant_core.formats import get_format  # noqa: E402
from comfyui_quantpress.quant_core.policy.presets import PRESETS  # noqa: E402
from comfyui_quantpress.quant_core.stored.fit import WORDS  # noqa: E402
from tool_files import bystanders, canonical_file, config_of, quantized, save, weight  # noqa: E402

# As its parser and its log name them. Every one must also be taken with - and _ exchanged.
NAMES = [
    "--actcal",
    "--actcal-device",
    "--actcal-lora",
    "--actcal-percentile",
    "--actcal-samples",
    "--actcal-seed",
    "--add-keys",
    "--block-size",
    "--calib-cpu",
    "--calib-samples",
    "--cleanup-fp8-scaled",
    "--comfy-quant",
    "--convert-fp8-scaled",
    "--convert-int8-scaled",
    "--convrot",
    "--convrot-group-size",
    "--custom-block-size",
    "--custom-convrot",
    "--custom-convrot-group-size",
    "--custom-fpmm",
    "--custom-full-precision-mm",
    "--custom-heur",
    "--custom-layers",
    "--custom-scaling-mode",
    "--custom-simple",
    "--custom-type",
    "--device",
    "--dry-run",
    "--dynamic-convrot",
    "--early-stop-loss",
    "--early-stop-lr",
    "--early-stop-stall",
    "--edit-quant",
    "--exclude-layers",
    "--extract-lora",
    "--fallback",
    "--fallback-block-size",
    "--fallback-simple",
    "--full-matrix",
    "--full-precision-matrix-mult",
    "--full-precision-mm",
    "--fullmatch",
    "--group-size",
    "--heur",
    "--hp-filter",
    "--input",
    "--input-scale",
    "--input-scales",
    "--int8",
    "--layer-config",
    "--legacy-input-add",
    "--lora-ar-threshold",
    "--lora-depth",
    "--lora-output",
    "--lora-rank",
    "--lora-target",
    "--low-memory",
    "--lr",
    "--lr-adaptive-mode",
    "--lr-cooldown",
    "--lr-factor",
    "--lr-gamma",
    "--lr-min",
    "--lr-patience",
    "--lr-schedule",
    "--lr-shape-influence",
    "--lr-threshold",
    "--lr-threshold-mode",
    "--make-hybrid-mxfp8",
    "--manual-seed",
    "--max-k",
    "--min-k",
    "--mxfp8",
    "--no-normalize-scales",
    "--num-iter",
    "--nvfp4",
    "--optimizer",
    "--output",
    "--quant-filter",
    "--remove-keys",
    "--save-quant-metadata",
    "--scale-optimization",
    "--scale-refinement",
    "--scaled-fp8-marker",
    "--scaling-mode",
    "--simple",
    "--tensor-scales",
    "--top-p",
    "--use-speed",
    "--verbose",
    "--verbose-pinned",
    "--nf4",
    "--fp4",
    "--af4",
    "--kernel-backend",
    "-esloss",
    "-eslr",
    "-esstall",
    "-fpmm",
    "-i",
    "-lm",
    "-o",
    "-n",
    "-h",
    "--help",
    "-hl",
    "--help-learned",
    "-he",
    "--help-experimental",
    "-hf",
    "--help-filters",
    "-ha",
    "--help-advanced",
    "-hm",
    "--help-modes",
    "-hlr",
    "--help-lora",
]


def model(
    path: Path, layers: tuple[str, ...] = ("blocks.0.attn", "blocks.0.mlp", "txt_in", "final_layer.linear")
) -> Path:
    return save(path, {f"{layer}.weight": weight(i) for i, layer in enumerate(layers)})


def compat(text: str, capsys) -> tuple[int, list[list[str]], list[str]]:
    """(exit code, the printed commands' arguments, the printed notes)."""
    code = main(["compat", *shlex.split(text)])
    lines = capsys.readouterr().out.splitlines()
    return (
        code,
        [shlex.split(line[6:])[1:] for line in lines if line.startswith("runs: ")],
        [line[6:] for line in lines if line.startswith("note: ")],
    )


def argument(dest: str) -> list[str]:
    option = next(option for option in OPTIONS if option.dest == dest)
    if option.kind is bool:
        return [option.names[0]]
    return [
        option.names[0],
        str(option.choices[0] if option.choices else {int: 32, float: 0.5, str: "x"}[option.kind]),
    ]


@pytest.mark.parametrize("name", NAMES + [f"--{name}" for name in PRESETS])
def test_every_option_is_known_in_both_spellings(name):
    known = {spelling for option in OPTIONS for spelling in option.spellings} | {
        f for flags in HELP_FLAGS.values() for f in flags
    }
    assert name in known
    if not name.startswith("--help"):
        assert {name[:2] + name[2:].replace("-", "_"), name[:2] + name[2:].replace("_", "-")} <= known


def test_no_spelling_means_two_things():
    spellings = [spelling for option in OPTIONS for spelling in option.spellings]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.dest)
def test_every_option_is_parsed_and_has_an_effect_or_is_named(option, tmp_path, capsys):
    path = model(tmp_path / "m.safetensors")
    words = argument(option.dest)
    before = {
        "hp_filter": "--convert-fp8-scaled",
        "full_precision_mm": "--convert-fp8-scaled",
        "add_keys": "--edit-quant",
        "remove_keys": "--edit-quant",
        "quant_filter": "--edit-quant",
        "scaled_fp8_marker": "--cleanup-fp8-scaled",
        "no_normalize_scales": "--cleanup-fp8-scaled",
        "custom_type": "--custom-layers attn",
        "custom_block_size": "--custom-layers attn --custom-type nf4",
        "custom_simple": "--custom-layers attn",
        "custom_scaling_mode": "--custom-layers attn --custom-type fp8",
        "fullmatch": "--exclude-layers .*mlp",
        "custom_convrot": "--custom-layers attn --custom-type int8 --custom-scaling-mode row",
        "custom_full_precision_mm": "--custom-layers attn",
        "fallback_block_size": "--fallback nf4 --exclude-layers mlp",
        "fallback_simple": "--fallback nf4 --exclude-layers mlp",
        "convrot": "--int8 --scaling_mode row",
        "convrot_group_size": "--int8 --scaling_mode row --convrot",
        "block_size": "--nf4",
        "kernel_backend": "--int8",
        "input_scales": "--nvfp4",
        "actcal_samples": "--actcal",
        "actcal_percentile": "--actcal",
        "actcal_lora": "--actcal",
        "actcal_seed": "--actcal",
        "lora_rank": "--extract-lora",
        "lora_target": "--extract-lora",
        "lora_depth": "--extract-lora",
        "lora_output": "--extract-lora",
        "save_quant_metadata": "--edit-quant --add-keys ''",
        "scaling_mode": "--int8",
    }.get(option.dest, "")
    if option.dest in ("scaling_mode", "custom_scaling_mode", "custom_type"):
        words[1] = "nvfp4" if option.dest == "custom_type" else "row"  # the first choice is the default
    fixed = f"-i {path} {before} --print-only" if option.dest != "input" else "--print-only"
    base = compat(f"-i {path} {before} --print-only", capsys) if option.dest not in ("input",) else None
    if option.help.startswith("refused"):
        try:
            code = main(["compat", *shlex.split(fixed), *words])
        except SystemExit as stopped:
            code = stopped.code
        assert code == 1
        return
    if option.dest == "input":
        words = ["--input", str(path)]
        base = (0, [], [])
    got = compat(shlex.join([*shlex.split(fixed), *words]), capsys)
    assert got[0] == 0
    if option.idle:
        assert any(note.startswith(option.names[0]) and "no effect" in note for note in got[2]), got
    elif option.dest in PRESETS or option.dest in ("scaled_fp8_marker", "convrot_group_size", "scale_optimization"):
        assert got[0] == 0  # their first value is the default, or depends on the model
    else:
        assert got[1:] != base[1:], got


CASES = [
    ("", "--format float8_e4m3fn"),
    ("--scaling_mode row", "--format float8_e4m3fn_rowwise"),
    ("--scaling-mode block --block_size 64", "--format float8_e4m3fn_blockwise --group-size 64"),
    ("--scaling_mode block2d", "--format float8_e4m3fn_blockwise"),
    ("--int8", "--format int8_tensorwise"),
    ("--int8 --scaling_mode row", "--format int8_rowwise"),
    ("--int8 --block_size 128", "--format int8_blockwise --group-size 128"),
    ("--int8 --kernel_backend lodewise", "--format int8_lodewise"),
    ("--nvfp4 --comfy_quant", "--format nvfp4"),
    ("--int8 --scaling_mode row --convrot --convrot-group-size 64", "--format int8_convrot --rotation 64"),
    ("--mxfp8", "--format mxfp8"),
    ("--nf4 --block_size 64", "--format bnb_nf4 --group-size 64"),
    ("--af4", "--format bnb_af4"),
    ("--exclude-layers mlp", "--format float8_e4m3fn --rule mlp=keep"),
    (
        "--fp4 --fallback=fp8 --exclude-layers mlp",
        "--format bnb_fp4 --rule mlp=float8_e4m3fn --fallback float8_e4m3fn",
    ),
    (
        "--custom-layers attn --custom-type int8 --custom-block-size 128 --custom-scaling-mode block --custom-simple",
        "--format float8_e4m3fn --rule attn=int8_blockwise:128,nearest",
    ),
    ("--flux2", r"--format float8_e4m3fn --keep final_layer --keep txt_in"),
    ("-fpmm", "--format float8_e4m3fn --add-config \"'full_precision_matrix_mult': true\""),
    ("--manual_seed 7", "--format float8_e4m3fn --seed 7"),
]


@pytest.mark.parametrize(("options", "expected"), CASES)
def test_formats_and_layers_are_mapped(tmp_path, capsys, options, expected):
    path = model(tmp_path / "m.safetensors")
    code, steps, _ = compat(f"-i {path} -o {tmp_path / 'o.safetensors'} --simple {options} --print-only", capsys)
    assert code == 0 and steps == [["quantize", str(path), str(tmp_path / "o.safetensors"), *shlex.split(expected)]]
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_learned_options_reach_our_learned_rounding(tmp_path, capsys):
    path, target = model(tmp_path / "m.safetensors", ("blocks.0.attn",)), tmp_path / "o.safetensors"
    code, steps, _ = compat(
        f"-i {path} -o {target} --int8 --scaling_mode row --num_iter 2 --lr 0.1 --lr_schedule plateau "
        "--top_p 0.1 --min_k 4 --optimizer adamw -esstall 3",
        capsys,
    )
    assert (
        code == 0
        and "learned" in steps[0]
        and {"iterations=2", "lr=0.1", "lr_schedule=plateau", "optimizer=adamw"} <= set(steps[0])
    )
    with open_source(target) as src:
        recipe = json.loads(src.metadata["quantpress"])["recipe"]
    assert (
        recipe["rounding"] == "learned"
        and recipe["options"]["iterations"] == 2
        and recipe["options"]["early_stop_stall"] == 3
    )


def test_the_printed_command_writes_the_same_bytes(tmp_path, capsys):
    path = model(tmp_path / "m.safetensors")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    code, steps, notes = compat(
        f"-i {path} -o {one} --simple --fp4 --custom-layers 'attn' --custom-type int8 "
        "--custom-scaling-mode row --fallback fp8 --exclude-layers mlp --low-memory -fpmm",
        capsys,
    )
    assert code == 0 and any(note.startswith("--low-memory: no effect") for note in notes)
    steps[0][2] = str(two)
    assert main(steps[0]) == 0
    assert one.read_bytes() == two.read_bytes()
    assert config_of(one, "blocks.0.attn") == {
        "format": "int8_tensorwise",
        "per_row": True,
        "full_precision_matrix_mult": True,
    }
    assert config_of(one, "blocks.0.mlp")["format"] == "float8_e4m3fn"


def test_names_are_made_as_the_older_tool_makes_them(tmp_path, capsys):
    path = model(tmp_path / "m.safetensors")
    for options, name in (
        ("--simple", "m_simple_fp8_tensor"),
        ("--nvfp4", "m_learned_nvfp4"),
        ("--simple --int8 --scaling_mode row --fallback fp8", "m_simple_int8mixed_row"),
    ):
        _, steps, _ = compat(f"-i {path} {options} --print-only", capsys)
        assert Path(steps[0][2]).name == f"{name}.safetensors"


@pytest.mark.parametrize(("options", "value"), [("--input_scale", 1.0), ("--t5xxl", None)])
def test_input_scales_are_added_in_a_second_step(tmp_path, capsys, options, value):
    path, target = model(tmp_path / "m.safetensors"), tmp_path / "o.safetensors"
    code, steps, _ = compat(f"-i {path} -o {target} --simple {options}", capsys)
    assert code == 0 and [step[0] for step in steps] == ["quantize", "migrate"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "o.safetensors"]
    with open_source(target) as src:
        assert float(src.read("blocks.0.mlp.input_scale")) == (value or float(src.read("blocks.0.mlp.weight_scale")))


def test_nvfp4_input_scales_come_from_a_file(tmp_path, capsys):
    path, target = model(tmp_path / "m.safetensors"), tmp_path / "o.safetensors"
    (tmp_path / "s.json").write_text(json.dumps({"blocks.0.attn": 0.25}))
    code, _, _ = compat(f"-i {path} -o {target} --simple --nvfp4 --input-scales {tmp_path / 's.json'}", capsys)
    with open_source(target) as src:
        assert code == 0 and float(src.read("blocks.0.attn.input_scale")) == 0.25


def test_what_quantizing_lost_is_written_as_a_lora(tmp_path, capsys):
    path, target = model(tmp_path / "m.safetensors"), tmp_path / "o.safetensors"
    code, steps, _ = compat(
        f"-i {path} -o {target} --simple --nvfp4 --extract-lora --lora-rank 4 --lora-target attn", capsys
    )
    assert code == 0 and "residual_depth=1" in steps[0]
    with open_source(tmp_path / "o_lora.safetensors") as src:
        assert {name: info.shape for name, info in src.tensors.items()} == {
            "diffusion_model.blocks.0.attn.lora_up.weight": (256, 4),
            "diffusion_model.blocks.0.attn.lora_down.weight": (4, 256),
        }


def test_activation_scales_are_simulated(tmp_path, capsys):
    path = canonical_file(tmp_path / "a.safetensors", "float8_e4m3fn")
    code, steps, notes = compat(
        f"-i {path} --actcal --actcal-samples 8 --actcal-percentile 100 --actcal-device cpu", capsys
    )
    assert code == 0 and steps == [
        [
            "calibrate",
            str(path),
            str(tmp_path / "a_calibrated.safetensors"),
            "--simulate",
            "--samples",
            "8",
            "--percentile",
            "100.0",
        ]
    ]
    assert [note.partition(":")[0] for note in notes] == ["--actcal-device"]
    with open_source(tmp_path / "a_calibrated.safetensors") as src:
        assert float(src.read("blocks.0.input_scale")) > 0


def legacy(path: Path, name: str = "float8_e4m3fn") -> Path:
    tensors, _ = quantized(get_format(name))
    old = {
        key.replace("weight_scale", "scale_weight").replace("input_scale", "scale_input"): t
        for key, t in tensors.items()
    }
    return save(
        path,
        {
            **old,
            **bystanders(),
            "final.scale_weight": torch.ones(()),
            "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn),
        },
    )


def test_modes_run_the_tools(tmp_path, capsys):
    source = legacy(tmp_path / "old.safetensors")
    run = lambda text: compat(f"{text} --overwrite", capsys)  # noqa: E731
    comfy, legacy8 = tmp_path / "old_comfy.safetensors", legacy(tmp_path / "old8.safetensors", "int8_lodewise")
    assert run(f"-i {source} --convert-fp8-scaled --hp-filter ^final --full-precision-mm --input_scale")[0] == 0
    assert config_of(comfy, "blocks.0") == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert run(f"-i {legacy8} -o {tmp_path / 'new8.safetensors'} --convert-int8-scaled --block_size 128")[0] == 0
    assert config_of(tmp_path / "new8.safetensors", "blocks.1")["format"] == "int8_lodewise"
    assert (
        run(
            f"-i {comfy} --edit-quant --remove-keys full_precision_matrix_mult --add-keys \"'note': 'x'\" "
            "--quant-filter 'blocks.0' --save-quant-metadata"
        )[0]
        == 0
    )
    assert config_of(tmp_path / "old_comfy_edited.safetensors", "blocks.0") == {"format": "float8_e4m3fn", "note": "x"}
    assert run(f"-i {source} --cleanup-fp8-scaled --scaled-fp8-marker 2 --input_scale --no-normalize-scales")[0] == 0
    assert run(f"-i {source} --legacy_input_add")[0] == 0
    with open_source(tmp_path / "old_cleaned.safetensors") as src:
        assert src.tensors["scaled_fp8"].shape == (2,) and "blocks.0.scale_input" in src.tensors


def test_dry_runs(tmp_path, capsys):
    path = model(tmp_path / "m.safetensors")
    assert compat(f"-i {path} --simple --dry-run", capsys)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert compat(f"-i {path} --dry-run create-template", capsys)[0] == 0
    template = tmp_path / "m_layer_config_template.json"
    filled = template.read_text().replace('"format": ""', '"format": "int8_tensorwise", "scaling_mode": "row"')
    template.write_text(filled)
    assert compat(f"-i {path} -o {tmp_path / 'o.safetensors'} --simple --layer-config {template}", capsys)[0] == 0
    assert config_of(tmp_path / "o.safetensors", "txt_in")["per_row"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--input is missing"),
        ({"input": "a", "nvfp4": True, "int8": True}, "cannot be used together"),
        ({"input": "a", "edit_quant": True, "convert_fp8_scaled": True}, "cannot be used together"),
        ({"input": "a", "make_hybrid_mxfp8": True}, "migrate"),
        ({"input": "a", "input_scale": True, "input_scales": "b"}, "both set input_scale"),
    ],
)
def test_what_cannot_be_done_is_said(options, message):
    with pytest.raises(RequestError, match=message):
        translate(options, [])


def test_a_missing_file_is_an_error_of_ours(tmp_path, capsys):
    assert main(["compat", "-i", str(tmp_path / "none.safetensors"), "--simple"]) == 1
    assert "none.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("section", SECTIONS)
def test_help_comes_in_sections(section, capsys):
    for flag in HELP_FLAGS[section]:
        assert main(["compat", flag]) == 0
        shown = capsys.readouterr().out
        listed = {line.split()[0].rstrip(",") for line in shown.splitlines() if line.startswith("  --")} - {
            "--overwrite",
            "--print-only",
        }
        assert listed == {option.names[0] for option in OPTIONS if option.section == section}
        assert all(HELP_FLAGS[other][0] in shown for other in SECTIONS if other != section)


def test_commands_of_the_tools_work_from_the_shell(tmp_path, capsys):
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    canonical_file(a, "bnb_nf4", header=False)
    assert main(["repair", str(a)]) == 0 and "header-missing" in capsys.readouterr().out
    assert main(["repair", str(a), str(b)]) == 0 and "written and verified" in capsys.readouterr().out
    assert main(["repair", str(b), "--json"]) == 0 and json.loads(capsys.readouterr().out)["findings"] == []
    assert main(["edit", str(b), str(c), "--add", "'x': 1", "--layers", "blocks.0"]) == 0
    assert main(["edit", str(b), "--add", "'x': 1", "--dry-run", "--json"]) == 0
    capsys.readouterr()
    assert main(["bitsandbytes", "export", str(c), str(tmp_path / "d.safetensors")]) == 0
    assert main(["bitsandbytes", "import", str(tmp_path / "d.safetensors"), str(tmp_path / "e.safetensors")]) == 0
    assert (
        main(
            [
                "requantize",
                str(tmp_path / "e.safetensors"),
                str(tmp_path / "f.safetensors"),
                "--format",
                "int8_rowwise",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert "added error" in capsys.readouterr().out
    assert main(["merge", "split", str(a), str(tmp_path / "s.safetensors.index.json"), "--max-gb", "0.00005"]) == 0
    assert main(["merge", "join", str(tmp_path / "s.safetensors.index.json"), str(tmp_path / "j.safetensors")]) == 0
    save_file(
        {"final.lora_down.weight": torch.ones(2, 64), "final.lora_up.weight": torch.ones(32, 2)},
        tmp_path / "l.safetensors",
    )
    assert (
        main(["merge", "lora", str(a), str(tmp_path / "g.safetensors"), "--lora", f"{tmp_path / 'l.safetensors'}:0.5"])
        == 0
    )
    assert main(["template", str(a), str(tmp_path / "t.json")]) == 0
    assert main(["migrate", str(a), str(a)]) == 1 and "same file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["edit", str(a), str(b)])
    assert stopped.value.code == 2


def test_every_finding_code_and_field_is_documented(tmp_path, capsys):
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "json.md").read_text(encoding="utf-8")
    codes = set(
        re.findall(
            r'found\.note\(\s*"([a-z0-9-]+)"', (root / "quant_core/tools/diagnose.py").read_text(encoding="utf-8")
        )
    ) | {step.value for step in WORDS}
    assert len(codes) > 20 and {code for code in codes if f"`{code}`" not in text} == set()
    assert main(["repair", str(canonical_file(tmp_path / "a.safetensors", header=False)), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    fields = set(content) | set(content["findings"][0]) | set(content["changes"][0]) | set(content["summary"])
    assert {field for field in fields if f"`{field}`" not in text} == set()
