"""What the command line says: flags by name, equal lines as one, files that are not models, no needless writing."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from comfyui_quantpress.cli.main import main
from comfyui_quantpress.cli.shared.groups import collapse_sentences
from comfyui_quantpress.cli.shared.wording import FLAGS, WORDS, in_flags, message
from comfyui_quantpress.nodes.shared.wording import INPUTS as NODE_INPUTS
from comfyui_quantpress.nodes.shared.wording import WORDS as NODE_WORDS
from comfyui_quantpress.nodes.shared.wording import in_inputs, names_its_inputs
from comfyui_quantpress.quant_core.errors import (
    OutputError,
    PlanError,
    Problem,
    Remedy,
    RequestError,
    counted,
    did_you_mean,
)
from comfyui_quantpress.quant_core.pipeline.report import against_nearest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
QUANTIZE = ["quantize", "model", "out", "--format", "int8_rowwise"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("files"), torch.Generator().manual_seed(1)
    model = {f"blocks.{i}.attn.qkv.weight": torch.randn(512, 256, generator=generator).bfloat16() for i in range(3)}
    model |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(512) for i in range(3)}
    save_file(model, folder / "model.safetensors")
    lora = {
        f"diffusion_model.blocks.{i}.attn.qkv.lora_{part}.weight": torch.randn(shape, generator=generator)
        for i in (0, 9)
        for part, shape in (("down", (4, 256)), ("up", (512, 4)))
    }
    save_file(lora, folder / "style.safetensors")
    save_file(
        {"layer.absmax": torch.ones(4)}, folder / "calibration.safetensors", metadata={"quantpress_calibration": "{}"}
    )
    save_file({"decoder.0.weight": torch.zeros(4, 4, 3, 3)}, folder / "vae.safetensors")
    save_file({"model.diffusion_model.other.weight": torch.zeros(4, 4)}, folder / "checkpoint.safetensors")
    save_file(model, folder / "model-00001-of-00002.safetensors")
    for name, content in (
        ("empty", b""),
        ("text", b"no model at all\n" * 40),
        ("cut", (folder / "model.safetensors").read_bytes()[:999]),
    ):
        (folder / f"{name}.safetensors").write_bytes(content)
    (folder / "bad.json").write_text("{no json")
    assert (
        main(
            [
                "quantize",
                str(folder / "model.safetensors"),
                str(folder / "int8.safetensors"),
                "--format",
                "int8_rowwise",
            ]
        )
        == 0
    )
    assert (
        main(["quantize", str(folder / "model.safetensors"), str(folder / "taken.safetensors"), "--format", "bnb_nf4"])
        == 0
    )
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
    """(exit code, stdout, stderr) of a command.

    Names without a slash or dash are files of the folder, and "out" is a new one.
    """
    known = {path.stem: str(path) for path in folder.iterdir()}

    def run(*args: str) -> tuple[int, str, str]:
        names = {
            **known,
            "out": str(tmp_path / "out.safetensors"),
            "missing/out": str(tmp_path / "missing" / "out.safetensors"),
        }
        before = {path: path.read_bytes() for path in folder.iterdir()}
        code = main([names.get(arg, arg) for arg in args])
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        return (code, *capsys.readouterr())

    return run


# --- wrong files and wrong requests --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["quantize", "style", *QUANTIZE[2:]], ["this file is a LoRA", "merge lora"]),
        (["quantize", "calibration", *QUANTIZE[2:]], ["this file is a calibration"]),
        (["quantize", "vae", *QUANTIZE[2:]], ["no linear weight", "'decoder.0.weight'", "text encoder"]),
        (["quantize", "model-00001-of-00002", *QUANTIZE[2:]], ["shard 1 of 2", ".index.json"]),
        (["quantize", "empty", *QUANTIZE[2:]], ["empty (0 bytes)", "Download"]),
        (["quantize", "text", *QUANTIZE[2:]], ["not a safetensors file"]),
        (["quantize", "cut", *QUANTIZE[2:]], ["truncated", "Download it again"]),
        (["quantize", "model", "missing/out", *QUANTIZE[3:]], ["the folder", "is missing. Create it"]),
        (
            ["quantize", "model", "model", *QUANTIZE[3:], "--overwrite"],
            ["same file as the source", "Choose another name"],
        ),
        (["template", "style", "out"], ["this file is a LoRA"]),
        (["template", "vae", "out"], ["no linear weight"]),
        (["verify", "int8", "--against", "style"], ["this file is a LoRA"]),
        (["merge", "lora", "style", "out", "--lora", "style"], ["this file is a LoRA"]),
        (["merge", "lora", "model", "out", "--lora", "model"], ["this is not a LoRA", "none of its 6 tensors"]),
        (["merge", "join", "model", "out"], ["one file already"]),
        (["calibrate", "int8", "out", "--simulate"], ["no layer of it can have an input scale", "int8_rowwise"]),
        ([*QUANTIZE, "--layer-config", "bad"], ["bad.json is not JSON", "Correct it there"]),
    ],
)
def test_a_wrong_file_is_named_for_what_it_is(args, words, run, tmp_path):
    code, out, err = run(*args)
    assert code == 1 and out == "" and err.startswith("quantpress: error: ")
    assert [word for word in words if word not in err] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["quantize", "model", "taken", *QUANTIZE[3:]], ["or replace it with --overwrite"]),
        (["dequantize", "int8", "taken"], ["or replace it with --overwrite"]),
        (["edit", "int8", "taken", "--add", "'a': 1"], ["or replace it with --overwrite"]),
        (["template", "model", "taken"], ["or replace it with --overwrite"]),
        (["merge", "lora", "model", "out", "--lora", "style"], ["1 layer is not in", "with --skip-unmatched"]),
        (
            ["merge", "split", "model", "out.safetensors.index.json", "--max-gb", "0.0001"],
            ["Allow larger shards with --max-gb"],
        ),
        (["merge", "extract", "model", "out"], ["with --prefix"]),
        (["merge", "insert", "checkpoint", "model", "out"], ["Use --force, if they are meant to differ"]),
        (
            ["edit", "int8", "out", "--remove", "format"],
            ["blocks.{0..2}.attn.qkv (3 layers): without `format`", "Keep the key. --force writes it all the same"],
        ),
        (
            ["edit", "int8", "out", "--add", "'format': 'nvfp4'"],
            ["(3 layers) is missing", "--force writes it all the same"],
        ),
        ([*QUANTIZE, "--keep", "("], ["--keep '(' is not a regular expression"]),
        ([*QUANTIZE, "--only", "nosuch"], ["--only 'nosuch' matches none of the 3 linear layers"]),
        ([*QUANTIZE, "--keep", "."], ["or name the layers with --only"]),
        ([*QUANTIZE, "--rule", "nosuch=keep"], ["--rule 'nosuch' matches none"]),
        ([*QUANTIZE, "--rule", "attn=nvp4"], ["--rule 'attn=nvp4': there is no format", "Did you mean nvfp4?"]),
        (
            ["quantize", "model", "out", "--format", "int8_rowise"],
            ["--format: there is no format", "Did you mean int8_rowwise?"],
        ),
        ([*QUANTIZE, "--fallback", "nvp4"], ["--fallback: there is no format"]),
        ([*QUANTIZE, "--scales", "minmax"], ["--scales: there is no method 'minmax'"]),
        ([*QUANTIZE, "--rounding", "up"], ["--rounding: there is no method 'up'"]),
        (
            [*QUANTIZE, "--option", "iteratons=3"],
            ["--option: there is no option 'iteratons'", "Did you mean iterations?"],
        ),
        ([*QUANTIZE, "--option", "iterations=few"], ["--option iterations: found 'few'"]),
        ([*QUANTIZE, "--group-size", "37"], ["--group-size 37 is not offered"]),
        ([*QUANTIZE, "--rotation", "37"], ["--rotation 37 is not offered"]),
        ([*QUANTIZE, "--add-config", "foo"], ["--add-config 'foo' is neither"]),
        ([*QUANTIZE, "--residual-lora", "r.bin"], ["--residual-lora r.bin needs"]),
        (["repair", "int8", "out", "--assume", "nvp4"], ["Did you mean nvfp4?"]),
    ],
)
def test_an_error_names_the_flag_that_it_is_about(args, words, run, tmp_path):
    code, out, err = run(*args)
    assert code == 1 and [word for word in words if word not in err] == []
    assert list(tmp_path.iterdir()) == []


def test_every_flag_of_another_name_exists():
    parsers = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cli").rglob("*.py"))
    assert [flag for flag in FLAGS.values() if f'"--{flag.replace("_", "-")}"' not in parsers] == []


def test_a_flag_is_named_only_where_the_command_has_it():
    err = RequestError("x is there. Choose another name.", "overwrite", Remedy.REPLACE)
    assert message(err, argparse.Namespace(force=False)) == "x is there. Choose another name."
    words = message(err, argparse.Namespace(overwrite=False))
    assert words == "x is there. Choose another name, or replace it with --overwrite."


@pytest.mark.parametrize(
    ("setting", "remedy", "command", "node"),
    [
        ("keep", Remedy.CORRECT, "--keep x.", "keep x."),
        ("layers", Remedy.CORRECT, "--layers x.", "layers x."),
        ("hp_filter", Remedy.CORRECT, "--hp-filter x.", "hp_filter x."),
        ("rules", Remedy.CORRECT, "--rule x.", "layer_config x."),
        ("options", Remedy.CORRECT, "--option x.", "options x."),
        ("config", Remedy.CORRECT, "--add-config x.", "config x."),
        ("group_size", Remedy.CORRECT, "--group-size x.", "group_size x."),
        ("rotation", Remedy.CORRECT, "--rotation x.", "group_size x."),
        ("device", Remedy.CORRECT, "--device x.", "device x."),
        ("dtype", Remedy.CORRECT, "--dtype x.", "dtype x."),
        ("residual_lora", Remedy.CORRECT, "--residual-lora x.", "residual_lora x."),
        (
            "overwrite",
            Remedy.REPLACE,
            "x, or replace it with --overwrite.",
            "x, or switch on overwrite to replace it.",
        ),
        ("force", Remedy.FORCE, "x. --force writes it all the same.", "x. Switch on force to write it all the same."),
        (
            "force",
            Remedy.DIFFER,
            "x. Use --force, if they are meant to differ.",
            "x. Switch on force, if they are meant to differ.",
        ),
        (
            "skip_unmatched",
            Remedy.LEAVE_OUT,
            "x, or leave such layers out with --skip-unmatched.",
            "x, or switch on skip_unmatched to leave such layers out.",
        ),
        (
            "allow_nonfinite",
            Remedy.KEEP,
            "x, or keep the layer as it is: name it in --keep, or give --allow-nonfinite.",
            "x, or keep the layer as it is: name it in keep.",
        ),
        ("only", Remedy.NAME_LAYERS, "x, or name the layers with --only.", "x, or name the layers in only."),
        (
            "prefix",
            Remedy.PREFIX,
            "x, or give the prefix of its diffusion model with --prefix.",
            "x, or write the prefix of its diffusion model into prefix.",
        ),
        ("max_bytes", Remedy.RAISE, "x. Allow larger shards with --max-gb.", "x. Set max_gb higher."),
        ("input_scales", Remedy.WRITE, "x. Write input scales (--write-input-scales).", "x. Switch on input_scales."),
        ("dtype", Remedy.WIDER, "x. Use --dtype bf16, or fp32.", "x. Set dtype to bf16, or fp32."),
        (
            "assume",
            Remedy.SAY_FORMAT,
            "x. Say which one with --assume, or find out with --against SOURCE instead.",
            "x. Say which one in assume, or connect the original there.",
        ),
        (
            "scale_name",
            Remedy.SAY_SCALE,
            "x. If they multiply, say how their names end with --scale-name; else take the 16-bit model.",
            "x. If they multiply, write how their names end into scale_name; else take the 16-bit model.",
        ),
    ],
)
def test_a_setting_has_words_in_the_command_line_and_in_the_nodes(setting, remedy, command, node):
    problem = Problem("x.", setting, remedy)
    inputs = [*NODE_INPUTS.get(setting, (setting,))]
    assert in_flags(problem, argparse.Namespace(**{FLAGS.get(setting, setting): None})) == command
    assert in_inputs(problem, inputs) == node
    assert "--" not in str(problem)


def test_both_have_words_for_every_remedy_and_send_the_user_to_where_a_format_is_told():
    assert set(Remedy) - {Remedy.CORRECT} == WORDS.keys() == NODE_WORDS.keys()
    problem = Problem("x.", "assume", Remedy.SAY_FORMAT)
    assert "`quantpress repair --assume`" in in_flags(problem, argparse.Namespace())
    assert "assume of the node Repair" in in_inputs(problem, ["keep"])
    problem = Problem("x.", "scale_name", Remedy.SAY_SCALE)
    assert "`quantpress migrate --scale-name`" in in_flags(problem, argparse.Namespace())
    assert "scale_name of the node Migrate Legacy File" in in_inputs(problem, ["keep"])


def test_a_nodes_error_is_of_the_same_kind_and_names_its_inputs():
    class Refusing:
        @classmethod
        def execute(cls, force: bool, errors: list) -> None:
            raise errors[0]

    node = names_its_inputs(Refusing)
    with pytest.raises(OutputError, match="^x.$"):
        node.execute(force=False, errors=[OutputError("x.", "overwrite", Remedy.REPLACE)])
    with pytest.raises(PlanError, match="^x. Switch on force to write it all the same.$"):
        node.execute(force=False, errors=[PlanError([Problem("x.", "force", Remedy.FORCE)])])


# --- nothing to do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["migrate", "model", "out"], ["nothing in it is quantized", "3 in BF16", "Nothing was written"]),
        (
            ["migrate", "int8", "out"],
            ["its 3 quantized layers are in ComfyUI's own form (int8_rowwise)", "use it as it is"],
        ),
        (["migrate", "int8", "--dry-run"], ["There is nothing to migrate"]),
        (["migrate", "style", "out"], ["this file is a LoRA"]),
        (["bitsandbytes", "import", "model", "out"], ["nothing to import", "nothing in it is quantized"]),
        (
            ["bitsandbytes", "import", "int8", "out"],
            ["no layer of it is stored in bitsandbytes' way", "Use it as it is"],
        ),
        (["edit", "int8", "out", "--remove", "nosuch"], ["the chosen layers say so already", "Nothing was written"]),
    ],
)
def test_where_nothing_changes_nothing_is_written(args, words, run, tmp_path):
    code, out, err = run(*args)
    assert code == 1 and out == "" and [word for word in words if word not in err] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["migrate", "edit", "bitsandbytes", "cleanup", "repair"])
def test_the_help_tells_the_exit_codes(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "Exit code 0" in capsys.readouterr().out


def test_a_sound_file_needs_no_repair_and_is_not_copied(run, tmp_path):
    code, out, err = run("repair", "int8", "out")
    assert code == 0 and err == "" and list(tmp_path.iterdir()) == []
    assert "no problems found; its 3 quantized layers" in out and "nothing was written" in out


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """NUL bytes behind one layer's JSON, which is repaired; NaN among the scales of two others, which is not."""
    tensors = load_file(folder / "int8.safetensors")
    tensors["blocks.0.attn.qkv.comfy_quant"] = torch.cat(
        (tensors["blocks.0.attn.qkv.comfy_quant"], torch.zeros(3, dtype=torch.uint8))
    )
    for i in (1, 2):
        tensors[f"blocks.{i}.attn.qkv.weight_scale"][1] = float("nan")
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path)
    return path


def test_repair_says_what_was_put_right_and_what_remains(damaged, tmp_path, capsys):
    target = tmp_path / "repaired.safetensors"
    assert main(["repair", str(damaged), str(target)]) == 1 and target.exists()
    out, err = capsys.readouterr()
    fixed, remaining = out.split("remaining: 2 problems")
    assert fixed.startswith("put right: ") and "config-nul" in fixed
    assert "blocks.{1..2}.attn.qkv.weight_scale (2 layers): 1 of 512 values are NaN" in remaining
    assert "written and read back; not all is put right" in out and "verified" not in out
    assert f"{target} was written, and 2 errors remain" in err


def test_a_fault_behind_a_description_that_nobody_could_read_is_told(damaged, tmp_path, capsys):
    tensors = load_file(damaged)
    tensors["blocks.0.attn.qkv.weight_scale"][1] = -1.0
    save_file(tensors, damaged)
    target = tmp_path / "repaired.safetensors"
    assert main(["repair", str(damaged), str(target)]) == 1
    out, err = capsys.readouterr()
    assert (
        "blocks.0.attn.qkv.weight_scale: 0 of 512 values are NaN or Inf and 1 are negative"
        in out.split("remaining: 3 problems")[1]
    )
    assert f"{target} was written, and 3 errors remain" in err


def test_a_preview_of_a_repair_promises_and_writes_nothing(damaged, tmp_path, capsys):
    assert main(["repair", str(damaged)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("can be put right: ") and "would remain: 2 problems" in out and "was written" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.safetensors"]
    assert main(["repair", str(damaged), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["target"] is None and sum(not finding["fixed"] for finding in content["findings"]) == 2


def test_verify_groups_equal_findings_and_json_keeps_all(damaged, capsys):
    assert main(["verify", str(damaged)]) == 1
    assert "blocks.{1..2}.attn.qkv.weight_scale (2 layers)" in capsys.readouterr().out
    assert main(["verify", str(damaged), "--json"]) == 1
    assert sum(finding["code"] == "scale-value" for finding in json.loads(capsys.readouterr().out)["findings"]) == 2


def test_verify_says_when_there_was_nothing_to_check(run):
    assert "nothing in it is described as quantized" in run("verify", "model")[1]


# --- the small parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentences", "lines"),
    [
        (["b.0.x: bad", "b.1.x: bad", "b.2.x: worse"], ["b.{0..1}.x (2 layers): bad", "b.2.x: worse"]),
        (
            ["b.0.x lacks b.0.x.weight_scale", "b.1.x lacks b.1.x.weight_scale"],
            ["b.{0..1}.x (2 layers) lacks b.{0..1}.x.weight_scale"],
        ),
        (["no name", "no name", "model.safetensors is bad"], ["no name", "model.safetensors is bad"]),
        (["b.0.x: bad", "c.0.x: bad", "b.1.x: bad"], ["b.{0..1}.x (2 layers): bad", "c.0.x: bad"]),
    ],
)
def test_sentences_that_differ_in_a_number_become_one(sentences, lines):
    assert collapse_sentences(sentences) == lines


def test_equal_problems_of_a_plan_are_one_line():
    err = PlanError([f"blocks.{i}.fc: bad" for i in range(4)])
    assert message(err, argparse.Namespace()) == "blocks.{0..3}.fc (4 layers): bad"
    assert message(PlanError(["a", "b"]), argparse.Namespace()) == "2 problems:\n  - a\n  - b"


def test_counts_and_suggestions():
    assert [counted(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
    assert counted(1, "layer is", "layers are") == "1 layer is" and counted(5, "bias", "biases") == "5 biases"
    assert did_you_mean("nvp4", ["nvfp4", "mxfp8"]) == " Did you mean nvfp4?" and did_you_mean("fp8", ["mxfp8"]) == ""


def test_the_gain_over_rounding_to_nearest_is_told_per_kind_of_error():
    row = lambda layer, objective, error, nearest: {  # noqa: E731
        "layer": layer,
        "objective": objective,
        "error": error,
        "nearest_error": nearest,
    }
    rows = [
        row("a", "output", 0.1, 0.4),
        row("b", "output", 0.3, 0.4),
        row("c", "output", 0.2, 0.4),
        row("d", "weight", 0.9, 1.0),
        row("e", "output", None, None),
        {"layer": "kept"},
    ]
    assert against_nearest(rows) == (
        "output error against rounding to nearest: median 0.50x, worst 0.75x (b)",
        "weight error against rounding to nearest: median 0.90x, worst 0.90x (d)",
    )


def test_quantize_tells_the_gain_and_plain_rounding_has_none(run):
    assert "against rounding to nearest: median" in run(*QUANTIZE, "--scales", "search")[1]
    assert "against rounding" not in run(*QUANTIZE, "--overwrite")[1]


def test_one_layer_is_no_layers(run):
    assert "1 layer quantized" in run(*QUANTIZE, "--only", r"blocks\.0")[1]
