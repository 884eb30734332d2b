"""A calibration in a conversion: it lowers the output error, is refused elsewhere, and the report says what it did."""

import json

import pytest
import torch
from comfyui_quantpress.cli.main import main
from comfyui_quantpress.quant_core.calibration.calibration import identity_of_source
from comfyui_quantpress.quant_core.calibration.capture.budget import Budget, plan_budget
from comfyui_quantpress.quant_core.calibration.capture.collector import Collector
from comfyui_quantpress.quant_core.calibration.capture.linear_modules import linear_modules
from comfyui_quantpress.quant_core.calibration.storage import load_calibration, save_calibration
from comfyui_quantpress.quant_core.calibration.use import CalibrationUse
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import InputFileError, OutputError, RequestError
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.pipeline.compare import verify_file
from comfyui_quantpress.quant_core.pipeline.plan import RECIPE_KEY
from comfyui_quantpress.quant_core.pipeline.request import Request
from comfyui_quantpress.quant_core.pipeline.run import convert
from comfyui_quantpress.quant_core.policy.recipe import Recipe, parse_recipe
from comfyui_quantpress.quant_core.stored.layers import stored_layers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

PREFIX = "model.diffusion_model."
WIDTH = 64


class Block(nn.Module):
    """Correlated inputs of nonzero mean, as after an activation: what makes data worth having."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.unused = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def inputs(seed, rows=1024):
    mix = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 12, generator=g) @ mix + 0.1 * torch.randn(rows, WIDTH, generator=g) + 0.5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, its checkpoint with a prefix, a calibration captured under the module's own names)."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = Model().to(torch.bfloat16).float()
    state = {PREFIX + name: t.to(torch.bfloat16) for name, t in model.state_dict().items()}
    save_file({**state, PREFIX + "norm.weight": torch.ones(WIDTH)}, folder / "model.safetensors")
    layers = linear_modules(model)
    with open_source(folder / "model.safetensors") as src:
        identity = identity_of_source(src, {name: f"{PREFIX}{name}.weight" for name in layers})
    collector = Collector(
        layers, plan_budget({n: m.in_features for n, m in layers.items()}, Budget()), fingerprint=identity.fingerprint
    )
    with torch.no_grad(), collector.capture(model, note="unit"):
        for seed in range(8):
            model(inputs(seed))
    save_calibration(collector.result(), folder / "calibration.safetensors")
    return model, folder / "model.safetensors", folder / "calibration.safetensors"


def output_error(made, target):
    """Relative error of every layer's output on rows that no calibration saw: {layer: error}, biases included."""
    model, source, _ = made
    original, found, errors = load_file(source), load_file(target), {}
    with open_source(target) as src:
        weights = {name: layer.decode(src) for name, layer in stored_layers(src).items()}
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, a, n=n: seen.__setitem__(n, a[0]))
        for n, m in linear_modules(model).items()
    ]
    with torch.no_grad():
        model(inputs(999))
    for hook in hooks:
        hook.remove()
    for name, x in seen.items():
        full = PREFIX + name
        bias, reference = found[full + ".bias"].float(), original[full + ".bias"].float()
        want = x @ original[full + ".weight"].float().T + reference
        errors[name] = float((x @ weights[full].T + bias - want).norm() / want.norm())
    return errors


@pytest.mark.parametrize("name", ["nvfp4", "int8_rowwise", "bnb_nf4", "float8_e4m3fn"])
def test_auto_with_data_lowers_the_output_error_of_every_seen_layer(made, tmp_path, name):
    _, source, calibration = made
    fmt = get_format(name)
    convert(Request(source, tmp_path / "plain.safetensors", Recipe(fmt), device="cpu"))
    report = convert(
        Request(
            source,
            tmp_path / "data.safetensors",
            parse_recipe(fmt, "auto", "auto"),
            device="cpu",
            calibration=CalibrationUse(calibration),
        )
    )
    plain, data = output_error(made, tmp_path / "plain.safetensors"), output_error(made, tmp_path / "data.safetensors")
    assert len(data) == 4 and all(data[layer] < 0.75 * plain[layer] for layer in data), (plain, data)
    rows = {row.layer: row for row in report.quantized}
    used = rows[PREFIX + "blocks.0.fc1"]
    assert (used.judgement.rounding, used.judgement.objective) == ("gptq", "output") and used.rows > 500
    assert used.judgement.error < used.judgement.nearest_error
    # A layer that saw nothing is quantized without data, and the user is told.
    assert (
        rows[PREFIX + "blocks.1.unused"].judgement.rounding == "nearest" and rows[PREFIX + "blocks.1.unused"].rows == 0
    )
    assert any("2 layers have no data" in w and "blocks.0.unused" in w for w in map(str, report.warnings))
    assert not verify_file(tmp_path / "data.safetensors", against=source).findings


def test_bias_correction_helps_is_recorded_and_does_not_fail_verification(made, tmp_path):
    _, source, calibration = made
    recipe, target = Recipe(get_format("nvfp4")), tmp_path / "b.safetensors"
    convert(Request(source, tmp_path / "plain.safetensors", recipe, device="cpu"))
    report = convert(
        Request(source, target, recipe, device="cpu", calibration=CalibrationUse(calibration, bias_correction=True))
    )
    before, after = output_error(made, tmp_path / "plain.safetensors"), output_error(made, target)
    original, found = load_file(source), load_file(target)
    corrected = [row.layer for row in report.quantized if row.bias_corrected]
    changed = [
        name.removesuffix(".bias")
        for name in original
        if name.endswith(".bias") and not torch.equal(original[name], found[name])
    ]
    assert corrected and set(corrected) == set(changed)
    assert all(after[layer.removeprefix(PREFIX)] < before[layer.removeprefix(PREFIX)] for layer in corrected)
    assert all(
        found[name].dtype is tensor.dtype and found[name].shape == tensor.shape
        for name, tensor in original.items()
        if name.endswith(".bias")
    )
    with safe_open(target, "pt") as file:
        record = json.loads(file.metadata()[RECIPE_KEY])["calibration"]
    assert record["bias_correction"] is True and record["file"] == calibration.name and record["layers"] == 4
    assert not verify_file(target, against=source).findings


def test_verification_still_finds_a_bias_that_no_record_allows(made, tmp_path):
    _, source, _ = made
    target = tmp_path / "b.safetensors"
    convert(Request(source, target, Recipe(get_format("nvfp4")), device="cpu"))
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(target)
    tensors[PREFIX + "blocks.0.fc1.bias"] += 1
    save_file(tensors, target, metadata)
    assert [f.code for f in verify_file(target, against=source).errors] == ["copy-differs"]


def test_input_scales_are_the_true_absmax_and_only_where_the_runtime_reads_them(made, tmp_path):
    _, source, path = made
    calibration = load_calibration(path)
    for name in ("float8_e4m3fn", "nvfp4", "int8_rowwise"):
        target = tmp_path / f"{name}.safetensors"
        report = convert(
            Request(
                source,
                target,
                Recipe(get_format(name)),
                device="cpu",
                calibration=CalibrationUse(path, input_scales=True),
            )
        )
        rule = get_format(name).runtime.input_scale
        found = {key: t for key, t in load_file(target).items() if key.endswith(".input_scale")}
        assert len(found) == (4 if rule is not None else 0)
        for key, scale in found.items():
            absmax = float(calibration.statistics[key.removeprefix(PREFIX).removesuffix(".input_scale")].absmax.max())
            assert scale.shape == () and float(scale) == pytest.approx(absmax / rule.largest)
        assert sum(row.input_scale is not None for row in report.quantized) == len(found)
        assert not verify_file(target, against=source).findings


def test_fp8_inputs_that_would_saturate_are_named(made, tmp_path):
    _, source, path = made
    loud = load_calibration(path)
    loud.statistics["blocks.1.fc2"].absmax.fill_(900.0)
    save_calibration(loud, tmp_path / "loud.safetensors")
    recipe = Recipe(get_format("float8_e4m3fn"))
    report = convert(
        Request(
            source,
            tmp_path / "a.safetensors",
            recipe,
            device="cpu",
            calibration=CalibrationUse(tmp_path / "loud.safetensors"),
        )
    )
    assert [
        w for w in map(str, report.warnings) if "beyond 448" in w and "blocks.1.fc2 (900)" in w and "1 layers" in w
    ]
    report = convert(
        Request(
            source,
            tmp_path / "b.safetensors",
            recipe,
            device="cpu",
            calibration=CalibrationUse(tmp_path / "loud.safetensors", input_scales=True),
        )
    )
    assert not [w for w in map(str, report.warnings) if "beyond" in w]


def test_another_models_calibration_is_refused_and_a_fine_tunes_is_named(made, tmp_path):
    _, source, calibration = made
    tensors = load_file(source)
    save_file({name: t for name, t in tensors.items() if "blocks.1.fc2" not in name}, tmp_path / "smaller.safetensors")
    wide = {**tensors, PREFIX + "blocks.0.fc1.weight": torch.zeros(128, 96, dtype=torch.bfloat16)}
    save_file(wide, tmp_path / "wide.safetensors")
    for name, said in (
        ("smaller", "has no blocks.1.fc2"),
        ("wide", r"blocks.0.fc1 is \[128, 64\] in the calibration"),
    ):
        with pytest.raises(RequestError, match=said):
            convert(
                Request(
                    tmp_path / f"{name}.safetensors",
                    tmp_path / "out.safetensors",
                    Recipe(get_format("nvfp4")),
                    calibration=CalibrationUse(calibration),
                )
            )
    tuned = {**tensors, PREFIX + "blocks.0.fc1.weight": tensors[PREFIX + "blocks.0.fc1.weight"] * 1.5}
    save_file(tuned, tmp_path / "tuned.safetensors")
    report = convert(
        Request(
            tmp_path / "tuned.safetensors",
            tmp_path / "out.safetensors",
            Recipe(get_format("nvfp4")),
            device="cpu",
            calibration=CalibrationUse(calibration),
        )
    )
    assert any("other weights" in str(text) for text in report.warnings)
    with pytest.raises(InputFileError, match="this is not a calibration"):
        convert(
            Request(
                source, tmp_path / "no.safetensors", Recipe(get_format("nvfp4")), calibration=CalibrationUse(source)
            )
        )
    assert not (tmp_path / "no.safetensors").exists()


def test_split_projections_share_the_statistics_of_the_joined_layer(tmp_path):
    """A file with diffusers' names has to_q, to_k and to_v where the running model has qkv. Their inputs are equal."""
    layers = {"joint_blocks.0.x_block.attn.qkv": nn.Linear(WIDTH, 3 * WIDTH)}
    collector = Collector(layers, plan_budget({name: WIDTH for name in layers}, Budget()))
    with torch.no_grad(), collector.capture(layers["joint_blocks.0.x_block.attn.qkv"]):
        layers["joint_blocks.0.x_block.attn.qkv"](inputs(0))
    path = save_calibration(collector.result(), tmp_path / "c.safetensors")
    names = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    save_file({f"{name}.weight": torch.randn(WIDTH, WIDTH).bfloat16() for name in names}, tmp_path / "m.safetensors")
    report = convert(
        Request(
            tmp_path / "m.safetensors",
            tmp_path / "o.safetensors",
            parse_recipe(get_format("nvfp4"), "auto", "auto"),
            device="cpu",
            calibration=CalibrationUse(path),
        )
    )
    assert sorted(row.layer for row in report.quantized if row.rows) == sorted(names)


def test_the_command_takes_the_calibration_and_says_what_it_did(made, tmp_path, capsys):
    _, source, calibration = made
    target, lora = tmp_path / "out.safetensors", tmp_path / "lora.safetensors"
    arguments = [
        "quantize",
        str(source),
        str(target),
        "--format",
        "nvfp4",
        "--device",
        "cpu",
        "--calibration",
        str(calibration),
        "--bias-correction",
        "--write-input-scales",
        "--residual-lora",
        str(lora),
        "--residual-rank",
        "4",
    ]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["layer"].removeprefix(PREFIX): row for row in report["layers"]}
    row = rows["blocks.0.fc1"]
    assert (report["recipe"]["scales"], report["recipe"]["rounding"]) == ("auto", "auto")
    assert (row["scales"], row["rounding"], row["objective"], row["fell_back"]) == ("search", "gptq", "output", False)
    assert row["error"] < row["nearest_error"] and row["residual_error"] < row["error"] and row["input_scale"] > 0
    assert row["bias_corrected"] in (True, False) and "bias_corrected" not in rows["blocks.0.unused"]
    parts = load_file(lora)
    assert parts["diffusion_model.blocks.0.fc1.lora_down.weight"].shape == (4, WIDTH)
    with open_source(target) as src:
        w = stored_layers(src)[PREFIX + "blocks.0.fc1"].decode(src)
    reference = load_file(source)[PREFIX + "blocks.0.fc1.weight"].float()
    up, down = (parts[f"diffusion_model.blocks.0.fc1.lora_{part}.weight"].float() for part in ("up", "down"))
    x = inputs(999)
    assert (x @ (w + up @ down - reference).T).norm() < 0.9 * (x @ (w - reference).T).norm()
    assert main([*arguments, "--overwrite"]) == 0
    assert "data    4x search + gptq, 2x search + nearest" in capsys.readouterr().out
    assert main([*arguments, "--dry-run"]) == 0
    assert "2 layers have no data" in capsys.readouterr().out


@pytest.mark.parametrize("rounding, warned", [("auto", True), ("gptq", True), ("nearest", False)])
def test_a_low_rank_part_on_gptq_is_warned_of_before_and_after(made, tmp_path, capsys, rounding, warned):
    _, source, calibration = made
    arguments = ["quantize", str(source), str(tmp_path / "out.safetensors"), "--format", "nvfp4", "--device", "cpu"]
    arguments += ["--rounding", rounding, "--calibration", str(calibration), "--json"]
    low_rank = ["--residual-lora", str(tmp_path / "lora.safetensors"), "--residual-rank", "4"]
    for more in (["--dry-run"], []):
        assert main([*arguments, *low_rank, *more]) == 0
        warnings = json.loads(capsys.readouterr().out)["warnings"]
        assert any("The residual LoRA stands on gptq" in warning for warning in warnings) is warned
    assert main([*arguments, "--dry-run"]) == 0
    assert "stands on gptq" not in capsys.readouterr().out


def test_requests_that_miss_something_are_refused_before_anything_is_written(made, tmp_path, capsys):
    _, source, _ = made
    base = ["quantize", str(source), str(tmp_path / "out.safetensors"), "--format", "nvfp4"]
    for more in (["--bias-correction"], ["--write-input-scales"], ["--residual-rank", "4"]):
        with pytest.raises(SystemExit):
            main([*base, *more])
        assert "needs --" in capsys.readouterr().err
    with pytest.raises(RequestError, match="both a rank and a file"):
        convert(
            Request(
                source, tmp_path / "out.safetensors", parse_recipe(get_format("nvfp4"), options={"residual_rank": 4})
            )
        )
    with pytest.raises(OutputError, match="name of its own"):
        convert(
            Request(
                source,
                tmp_path / "out.safetensors",
                parse_recipe(get_format("nvfp4"), options={"residual_rank": 4}),
                residual_lora=tmp_path / "out.safetensors",
            )
        )
    assert not list(tmp_path.iterdir())
