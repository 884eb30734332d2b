"""`quantpress calibrate` and `quantpress calibration`: from captured files, LoRAs, lists and guesses into a file."""

import json

import pytest
import torch
from comfyui_quantpress.cli.main import main
from comfyui_quantpress.quant_core.calibration.calls import CallSample, call_key
from comfyui_quantpress.quant_core.calibration.capture.budget import Budget, plan_budget
from comfyui_quantpress.quant_core.calibration.capture.collector import Collector
from comfyui_quantpress.quant_core.calibration.storage import load_calibration, save_calibration
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.pipeline.request import Request
from comfyui_quantpress.quant_core.pipeline.run import convert
from comfyui_quantpress.quant_core.policy.recipe import Recipe
from safetensors.torch import load_file, save_file
from torch import nn

WIDTH, LAYERS = 64, ("blocks.0.fc1", "blocks.0.fc2")
KEYS = {f"model.diffusion_model.{layer}.input_scale" for layer in LAYERS}


def capture(path, seed, width=WIDTH, calls=0):
    layers = {name: nn.Linear(width, 2 * width) for name in LAYERS}
    collector = Collector(layers, plan_budget({name: width for name in layers}, Budget()))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad(), collector.capture(layers[LAYERS[0]], note=f"seed {seed}"):
        for layer in layers.values():
            layer(3 * torch.randn(300, width, generator=g))
    calibration = collector.result()
    calibration.calls = CallSample(calls)
    for number in range(calls):
        assert calibration.calls.offer(lambda: {"x": torch.zeros(1000)}, call_key(seed, 1, number))
    return save_calibration(calibration, path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, g = tmp_path_factory.mktemp("calibrate"), torch.Generator().manual_seed(0)
    model = {
        f"model.diffusion_model.{layer}.weight": torch.randn(2 * WIDTH, WIDTH, generator=g).bfloat16()
        for layer in LAYERS
    }
    save_file(model, folder / "model.safetensors")
    convert(
        Request(
            folder / "model.safetensors", folder / "fp8.safetensors", Recipe(get_format("float8_e4m3fn")), device="cpu"
        )
    )
    for seed in (1, 2):
        capture(folder / f"cal{seed}.safetensors", seed)
    save_file(
        {
            f"lora_unet_blocks_0_fc1.lora_{part}.weight": torch.randn(shape, generator=g)
            for part, shape in (("down", (4, WIDTH)), ("up", (2 * WIDTH, 4)))
        },
        folder / "lora.safetensors",
    )
    (folder / "scales.json").write_text(json.dumps({layer: 0.25 for layer in LAYERS}))
    return folder


def patched(path):
    return {name: float(t) for name, t in load_file(path).items() if name.endswith(".input_scale")}


def test_from_a_calibration_the_true_absmax(files, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert (
        main(["calibrate", str(files / "fp8.safetensors"), str(out), "--from", str(files / "cal1.safetensors")]) == 0
    )
    assert "2 added, 0 changed" in capsys.readouterr().out
    statistics = load_calibration(files / "cal1.safetensors").statistics
    assert patched(out) == pytest.approx(
        {f"model.diffusion_model.{layer}.input_scale": float(s.absmax.max()) / 448 for layer, s in statistics.items()}
    )
    before, after = load_file(files / "fp8.safetensors"), load_file(out)
    assert all(torch.equal(after[name].float(), t.float()) for name, t in before.items())
    main(
        [
            "calibrate",
            str(files / "fp8.safetensors"),
            str(out),
            "--from",
            str(files / "cal1.safetensors"),
            "--percentile",
            "99",
            "--overwrite",
        ]
    )
    assert all(
        value
        < 0.9
        * float(statistics[name.removeprefix("model.diffusion_model.").removesuffix(".input_scale")].absmax.max())
        / 448
        for name, value in patched(out).items()
    )


@pytest.mark.parametrize(
    "source, said",
    [
        (["--simulate"], "64 random inputs, percentile 99.9"),
        (["--lora", "lora.safetensors"], "lora.safetensors for 1 layer, random inputs for 1"),
        (["--input-scales", "scales.json"], "file scales.json"),
        (["--weight-scales"], "the weight scales"),
    ],
)
def test_the_other_sources_cover_both_layers(files, tmp_path, capsys, source, said):
    out = tmp_path / "out.safetensors"
    source = [str(files / part) if "." in part else part for part in source]
    arguments = ["calibrate", str(files / "fp8.safetensors"), str(out), *source]
    assert main([*arguments, "--dry-run", "--json"]) == 0 and not out.exists()
    shown = json.loads(capsys.readouterr().out)
    assert said in shown["method"] and len(shown["added"]) == 2
    assert main(arguments) == 0
    found = patched(out)
    assert set(found) == KEYS and all(value > 0 for value in found.values())
    if "--input-scales" in source:
        assert set(found.values()) == {0.25}
    if "--weight-scales" in source:
        weights = load_file(out)
        assert all(
            value == float(weights[name.replace("input_scale", "weight_scale")]) for name, value in found.items()
        )
    main([*arguments[:3], *source, "--overwrite"])
    assert patched(out) == found


def test_a_model_without_a_use_for_it_and_another_models_calibration_are_refused(files, tmp_path, capsys):
    convert(
        Request(
            files / "model.safetensors",
            tmp_path / "int8.safetensors",
            Recipe(get_format("int8_rowwise")),
            device="cpu",
        )
    )
    assert main(["calibrate", str(tmp_path / "int8.safetensors"), str(tmp_path / "o.safetensors"), "--simulate"]) == 1
    assert "no layer of it can have an input scale" in capsys.readouterr().err
    wide = capture(tmp_path / "wide.safetensors", 1, width=96)
    assert (
        main(["calibrate", str(files / "fp8.safetensors"), str(tmp_path / "o.safetensors"), "--from", str(wide)]) == 1
    )
    assert "belongs to another model" in capsys.readouterr().err
    assert not (tmp_path / "o.safetensors").exists()


def test_inspect_and_merge(files, tmp_path, capsys):
    both = tmp_path / "both.safetensors"
    assert (
        main(["calibration", "merge", str(both), str(files / "cal1.safetensors"), str(files / "cal2.safetensors")])
        == 0
    )
    assert "2 layers, 2 runs" in capsys.readouterr().out
    assert main(["calibration", "inspect", str(both), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [run["note"] for run in shown["runs"]] == ["seed 1", "seed 2"]
    singles = [load_calibration(files / f"cal{seed}.safetensors").statistics[LAYERS[0]] for seed in (1, 2)]
    assert shown["layers"][0]["sampled"] == sum(int(s.count) for s in singles)
    assert shown["layers"][0]["absmax"] == max(float(s.absmax.max()) for s in singles)
    assert main(["calibration", "inspect", str(both)]) == 0
    text = capsys.readouterr().out
    assert "run 2: 1 step, seed 2" in text and "blocks.0.fc2" in text and "model call" not in text
    assert shown["calls"] == {"count": 0, "bytes": 0}
    assert (
        main(["calibration", "merge", str(both), str(files / "cal1.safetensors"), str(files / "cal2.safetensors")])
        == 1
    )
    with pytest.raises(SystemExit):
        main(["calibration", "merge", str(tmp_path / "x.safetensors"), str(both)])


@pytest.mark.parametrize("calls, said", [((1, 0), "1 model call"), ((2, 3), "3 model calls")])
def test_inspect_and_merge_count_the_model_calls_kept(tmp_path, capsys, calls, said):
    """The larger limit holds for the merged file: of two and three calls the three with the smallest keys stay."""
    paths = [str(capture(tmp_path / f"{seed}.safetensors", seed, calls=count)) for seed, count in enumerate(calls)]
    both = tmp_path / "both.safetensors"
    assert main(["calibration", "merge", str(both), *paths]) == 0
    assert f"2 runs, {said}\n" in capsys.readouterr().out
    assert main(["calibration", "inspect", str(both)]) == 0
    assert f"  {said} kept whole, {4.0 * max(calls):.1f} kB\n" in capsys.readouterr().out
    assert main(["calibration", "inspect", str(both), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == {"count": max(calls), "bytes": 4000 * max(calls)}


def test_quantize_makes_the_same_file_with_calls_in_the_calibration(files, tmp_path, capsys):
    """Bytes of all tensors: the command line cannot run the model, so calls change nothing."""
    made = {}
    for calls in (0, 5):
        calibration, out = (
            capture(tmp_path / f"cal{calls}.safetensors", 3, calls=calls),
            tmp_path / f"out{calls}.safetensors",
        )
        assert (
            main(
                [
                    "quantize",
                    str(files / "model.safetensors"),
                    str(out),
                    "--format",
                    "nvfp4",
                    "--calibration",
                    str(calibration),
                ]
            )
            == 0
        )
        assert "gptq" in capsys.readouterr().out
        made[calls] = load_file(out)
    assert made[0].keys() == made[5].keys()
    assert all(
        torch.equal(made[0][name].reshape(-1).view(torch.uint8), made[5][name].reshape(-1).view(torch.uint8))
        for name in made[0]
    )
