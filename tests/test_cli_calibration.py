"""`quantpress calibrate` and `quantpress calibration`: from captured files, LoRAs, lists and guesses into a file."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from comfyui_quantpress.cli.main import main
from comfyui_quantpress.quant_core.calibration.budget import Budget, plan_budget
from comfyui_quantpress.quant_core.calibration.collector import Collector
from comfyui_quantpress.quant_core.calibration.storage import load_calibration, save_calibration
from comfyui_quantpress.quant_core.format import get_format
from comfyui_quantpress.quant_core.recipe import Recipe
from comfyui_quantpress.quant_core.run import convert

WIDTH, LAYERS = 64, ("blocks.0.fc1", "blocks.0.fc2")
KEYS = {f"model.diffusion_model.{layer}.input_scale" for layer in LAYERS}


def capture(path, seed, width=WIDTH):
    layers = {name: nn.Linear(width, 2 * width) for name in LAYERS}
    collector = Collector(layers, plan_budget({name: width for name in layers}, Budget()))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad(), collector.capture(layers[LAYERS[0]], note=f"seed {seed}"):
        for layer in layers.values():
            layer(3 * torch.randn(300, width, generator=g))
    return save_calibration(collector.result(), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, g = tmp_path_factory.mktemp("calibrate"), torch.Generator().manual_seed(0)
    model = {f"model.diffusion_model.{layer}.weight": torch.randn(2 * WIDTH, WIDTH, generator=g).bfloat16() for layer in LAYERS}
    save_file(model, folder / "model.safetensors")
    convert(folder / "model.safetensors", folder / "fp8.safetensors", Recipe(get_format("float8_e4m3fn")), device="cpu")
    for seed in (1, 2):
        capture(folder / f"cal{seed}.safetensors", seed)
    save_file({f"lora_unet_blocks_0_fc1.lora_{part}.weight": torch.randn(shape, generator=g)
               for part, shape in (("down", (4, WIDTH)), ("up", (2 * WIDTH, 4)))}, folder / "lora.safetensors")
    (folder / "scales.json").write_text(json.dumps({layer: 0.25 for layer in LAYERS}))
    return folder


def patched(path):
    return {name: float(t) for name, t in load_file(path).items() if name.endswith(".input_scale")}


def test_from_a_calibration_the_true_absmax(files, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["calibrate", str(files / "fp8.safetensors"), str(out), "--from", str(files / "cal1.safetensors")]) == 0
    assert "2 added, 0 changed" in capsys.readouterr().out
    statistics = load_calibration(files / "cal1.safetensors").statistics
    assert patched(out) == pytest.approx({f"model.diffusion_model.{layer}.input_scale": float(s.absmax.max()) / 448
                                          for layer, s in statistics.items()})
    before, after = load_file(files / "fp8.safetensors"), load_file(out)
    assert all(torch.equal(after[name].float(), t.float()) for name, t in before.items())
    main(["calibrate", str(files / "fp8.safetensors"), str(out), "--from", str(files / "cal1.safetensors"), "--percentile", "99",
          "--overwrite"])
    assert all(value < 0.9 * float(statistics[name.removeprefix("model.diffusion_model.").removesuffix(".input_scale")].absmax.max()) / 448
               for name, value in patched(out).items())


@pytest.mark.parametrize("source, said", [
    (["--simulate"], "64 random inputs, percentile 99.9"), (["--lora", "lora.safetensors"], "lora.safetensors for 1 layer, random inputs for 1"),
    (["--input-scales", "scales.json"], "file scales.json"), (["--weight-scales"], "the weight scales")])
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
        assert all(value == float(weights[name.replace("input_scale", "weight_scale")]) for name, value in found.items())
    main([*arguments[:3], *source, "--overwrite"])
    assert patched(out) == found


def test_a_model_without_a_use_for_it_and_another_models_calibration_are_refused(files, tmp_path, capsys):
    convert(files / "model.safetensors", tmp_path / "int8.safetensors", Recipe(get_format("int8_rowwise")), device="cpu")
    assert main(["calibrate", str(tmp_path / "int8.safetensors"), str(tmp_path / "o.safetensors"), "--simulate"]) == 1
    assert "no layer of it can have an input scale" in capsys.readouterr().err
    wide = capture(tmp_path / "wide.safetensors", 1, width=96)
    assert main(["calibrate", str(files / "fp8.safetensors"), str(tmp_path / "o.safetensors"), "--from", str(wide)]) == 1
    assert "belongs to another model" in capsys.readouterr().err
    assert not (tmp_path / "o.safetensors").exists()


def test_inspect_and_merge(files, tmp_path, capsys):
    both = tmp_path / "both.safetensors"
    assert main(["calibration", "merge", str(both), str(files / "cal1.safetensors"), str(files / "cal2.safetensors")]) == 0
    assert "2 layers, 2 runs" in capsys.readouterr().out
    assert main(["calibration", "inspect", str(both), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [run["note"] for run in shown["runs"]] == ["seed 1", "seed 2"]
    singles = [load_calibration(files / f"cal{seed}.safetensors").statistics[LAYERS[0]] for seed in (1, 2)]
    assert shown["layers"][0]["sampled"] == sum(int(s.count) for s in singles)
    assert shown["layers"][0]["absmax"] == max(float(s.absmax.max()) for s in singles)
    assert main(["calibration", "inspect", str(both)]) == 0
    text = capsys.readouterr().out
    assert "run 2: 1 step, seed 2" in text and "blocks.0.fc2" in text
    assert main(["calibration", "merge", str(both), str(files / "cal1.safetensors"), str(files / "cal2.safetensors")]) == 1
    with pytest.raises(SystemExit):
        main(["calibration", "merge", str(tmp_path / "x.safetensors"), str(both)])
