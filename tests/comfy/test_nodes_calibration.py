"""Capturing in a real ComfyUI with the trained model: it helps, is repeatable, and leaves no hook behind."""

import json
import time

import pytest
import torch
from comfy_server import Graph, WorkflowError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CLASSES, STEPS, HELD_OUT = (0, 3, 5, 8), 20, (101, 102)
MODEL = "trained_sd3.safetensors"


class Calibrating(Graph):
    """Graphs around one capture. Node ids are the same in all of them, so that ComfyUI's cache keeps the capture."""

    def __init__(self, runs="accumulate", model=MODEL, patch=None, **settings):
        super().__init__()
        self.original = self.unet(model)
        source = self.original if patch is None else self.add(patch[0], model=(self.original, 0), **patch[1])
        defaults = {"hessians": True, "device_gb": 4.0, "ram_gb": 4.0, "rows_per_step": 128, "layers": "", "seed": 0}
        self.capture = self.add("QuantPressCapture", model=(source, 0), runs=runs, **{**defaults, **settings})
        self.negative = self.add("QuantPressTestConditioning", model=(self.original, 0), kind="zeros", seed=0)
        self.noise = self.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)

    def draw(self, model, label, seed, steps=STEPS):
        positive = self.add("QuantPressTestConditioning", model=(self.original, 0), kind="demo shapes", seed=label)
        return self.add(
            "KSampler",
            model=(model, 0),
            positive=(positive, 0),
            negative=(self.negative, 0),
            latent_image=(self.noise, 0),
            seed=seed,
            steps=steps,
            cfg=3.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )

    def capture_all(self, classes=CLASSES, steps=STEPS, seed=0):
        """Sample every class with the captured model; a latent that waits for all."""
        last = None
        for label in classes:
            drawn = self.draw(self.capture, label, seed + label, steps)
            last = drawn if last is None else self.add("LatentBatch", samples1=(last, 0), samples2=(drawn, 0))
        return last

    def collect(self, latent):
        return self.add("QuantPressCollect", latent=(latent, 0), capture=(self.capture, 1))

    def save(self, calibration, name):
        return self.add("QuantPressSaveCalibration", calibration=(calibration, 0), name=name, overwrite=True)


def calibration_file(server, name):
    return server.base / f"models/calibrations/{name}.safetensors"


def manifest(server, name):
    with safe_open(calibration_file(server, name), "pt") as file:
        return json.loads(file.metadata()["quantpress_calibration"])


def snr_db(reference, found):
    return float(10 * torch.log10(reference.square().sum() / (reference - found).square().sum()))


def test_captured_quantized_with_gptq_and_sampled_in_one_graph_beats_nearest(server):
    graph = Calibrating()
    calibration = graph.collect(graph.capture_all())
    graph.save(calibration, "four_classes")
    source = graph.source("trained_sd3")
    models = {"original": graph.original}
    for name, recipe in {
        "nearest": {},
        "gptq": {"scales": "auto", "rounding": "auto", "calibration": (calibration, 0)},
    }.items():
        quantized = graph.quantize(source, format="nvfp4", **recipe)
        models[name] = graph.add("QuantPressLoadQuantized", quantized=(quantized, 0))
        graph.nodes[models[name]]["quantized_by"] = quantized
    for name, model in models.items():
        for label in CLASSES[:2]:
            for seed in HELD_OUT:
                drawn = graph.draw(model, label, seed)
                graph.add("SaveLatent", samples=(drawn, 0), filename_prefix=f"cal_{name}_{label}_{seed}")
    report = server.run(graph)[graph.nodes[models["gptq"]].pop("quantized_by")]["text"][0]
    gains = []
    for label in CLASSES[:2]:
        for seed in HELD_OUT:
            original, nearest, gptq = (
                server.latent(f"cal_{name}_{label}_{seed}") for name in ("original", "nearest", "gptq")
            )
            gains.append(snr_db(original, gptq) - snr_db(original, nearest))
    print("latent SNR gain in dB by picture:", [round(gain, 1) for gain in gains])
    assert sum(gains) / len(gains) > 2.0 and "warning" not in report, (gains, report)
    found = manifest(server, "four_classes")
    assert sorted(run["note"] for run in found["runs"]) == [f"seed {label}" for label in CLASSES]
    assert all(
        len(run["steps"]) == STEPS and set(run["labels"]) == {"cond", "uncond"} and run["completed"]
        for run in found["runs"]
    )
    assert list(found["runs"][0]["sigmas"].values()) == sorted(found["runs"][0]["sigmas"].values(), reverse=True)
    assert found["model"]["fingerprint"]


def test_the_saved_calibration_is_listed_loaded_and_used_and_a_stranger_is_refused(server):
    graph = Calibrating()
    graph.save(graph.collect(graph.capture_all((1,), 2)), "sub/one")
    server.run(graph)
    listed = server.call("/object_info/QuantPressLoadCalibration")["QuantPressLoadCalibration"]["input"]["required"][
        "file"
    ]
    assert "calibrations/sub/one.safetensors" in (listed[1]["options"] if listed[0] == "COMBO" else listed[0])
    for source, wrong in (("trained_sd3", None), ("random_flux", "belongs to another model")):
        graph = Graph()
        calibration = graph.add("QuantPressLoadCalibration", file="calibrations/sub/one.safetensors")
        node = graph.quantize(
            graph.source(source),
            format="float8_e4m3fn",
            scales="auto",
            rounding="auto",
            only="attn",
            calibration=(calibration, 0),
            input_scales=True,
        )
        graph.add("QuantPressSave", quantized=(node, 0), folder="output", name=f"scaled_{source}", overwrite=True)
        if wrong is None:
            server.run(graph)
            found = load_file(server.base / f"output/scaled_{source}.safetensors")
            assert (
                sum(name.endswith(".input_scale") for name in found)
                == sum(name.endswith(".comfy_quant") for name in found)
                > 5
            )
            continue
        with pytest.raises(WorkflowError, match=wrong):
            server.run(graph)


def test_the_same_seeds_give_the_same_calibration_and_another_seed_does_not(server):
    files = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 7)):
        graph = Calibrating("start over", rows_per_step=16)
        graph.save(graph.collect(graph.capture_all((2, 4), 3, seed)), f"same_{name}")
        server.run(graph)
        files[name] = load_file(calibration_file(server, f"same_{name}"))
        assert len(manifest(server, f"same_{name}")["runs"]) == 2
    assert files["first"].keys() == files["again"].keys()
    assert all(torch.equal(tensor, files["again"][name]) for name, tensor in files["first"].items())
    assert not torch.equal(
        files["first"]["joint_blocks.0.x_block.attn.qkv.sum"], files["other"]["joint_blocks.0.x_block.attn.qkv.sum"]
    )


def test_pictures_stay_the_same_while_they_are_watched(server):
    graph = Calibrating(rows_per_step=17)
    for name, model in (("watched", graph.capture), ("plain", graph.original)):
        graph.add("SaveLatent", samples=(graph.draw(model, 6, 50, 3), 0), filename_prefix=f"cal_same_{name}")
    server.run(graph)
    assert torch.equal(server.latent("cal_same_watched"), server.latent("cal_same_plain"))


def test_runs_accumulate_cancel_keeps_what_was_captured_and_no_hook_stays(server):
    def seen(name):
        found = manifest(server, name)
        return found["layers"]["joint_blocks.0.x_block.attn.qkv"]["seen"], found["runs"]

    graph = Calibrating(rows_per_step=18)
    graph.save(graph.collect(graph.capture_all((1,), 2)), "part1")
    server.run(graph)
    first, runs = seen("part1")
    assert len(runs) == 1 and first > 0
    graph = Calibrating(rows_per_step=18)
    graph.add("SaveLatent", samples=(graph.capture_all((2,), 4000), 0), filename_prefix="never")
    prompt = server.submit(graph)
    time.sleep(3)
    server.call("/interrupt", {})
    with pytest.raises(WorkflowError) as stopped:
        server.wait(prompt)
    assert stopped.value.kind == "interrupted"
    for name in ("part2", "part3"):  # nothing is sampled with the capture: the latent is empty
        graph = Calibrating(rows_per_step=18)
        if name == "part3":  # and what is sampled without it is not seen, though it is the same module
            drawn = graph.draw(graph.original, 3, 60, 2)
        graph.save(graph.collect(graph.noise if name == "part2" else drawn), name)
        server.run(graph)
    second, runs = seen("part2")
    assert [run["completed"] for run in runs] == [True, False] and runs[1]["steps"] and second > first
    assert seen("part3")[0] == second


def test_an_empty_capture_a_compiled_model_and_a_wrong_pattern_say_what_to_do(server):
    graph = Calibrating(rows_per_step=19)
    graph.save(graph.collect(graph.noise), "empty")
    with pytest.raises(WorkflowError, match="the calibration is empty") as failed:
        server.run(graph)
    assert failed.value.node == "QuantPressCollect" and not calibration_file(server, "empty").exists()
    graph = Calibrating(patch=("TorchCompileModel", {"backend": "inductor"}))
    graph.save(graph.collect(graph.capture_all((1,), 1)), "compiled")
    with pytest.raises(WorkflowError, match="Remove the compile node") as failed:
        server.run(graph)
    assert failed.value.node == "QuantPressCapture"
    for pattern, said in (
        ("(", "is not a regular expression"),
        ("no_such_layer", "has no linear layer whose name matches"),
    ):
        graph = Calibrating(layers=pattern)
        graph.save(graph.collect(graph.capture_all((1,), 1)), "pattern")
        with pytest.raises(WorkflowError, match=said):
            server.run(graph)


def test_a_lora_while_capturing_is_recorded(server):
    state = load_file(server.base / "models/diffusion_models" / MODEL)
    name = "joint_blocks.0.x_block.attn.qkv"
    n, k = state[f"{name}.weight"].shape
    save_file(
        {
            f"diffusion_model.{name}.lora_up.weight": torch.randn(n, 2) * 0.1,
            f"diffusion_model.{name}.lora_down.weight": torch.randn(2, k) * 0.1,
        },
        server.base / "models/loras/small.safetensors",
    )
    graph = Calibrating(patch=("LoraLoaderModelOnly", {"lora_name": "small.safetensors", "strength_model": 1.0}))
    collected = graph.collect(graph.capture_all((1,), 2))
    graph.save(collected, "with_lora")
    assert "captured with LoRAs or other patches" in server.run(graph)[collected]["text"][0]
    assert manifest(server, "with_lora")["runs"][0]["loras"] == ["1 patched weights"]
    plain = Calibrating()
    plain.save(plain.collect(plain.capture_all((1,), 2)), "without_lora")
    server.run(plain)
    one, other = manifest(server, "with_lora"), manifest(server, "without_lora")
    assert (
        other["runs"][0]["loras"] == [] and one["model"] == other["model"]
    )  # the LoRA is not mistaken for another training
    again = Calibrating(patch=("LoraLoaderModelOnly", {"lora_name": "small.safetensors", "strength_model": 0.5}))
    again.save(again.collect(again.capture_all((1,), 2)), "with_lora")  # now a LoRA was in the weights before
    server.run(again)
    assert manifest(server, "with_lora")["model"] == other["model"]


def test_without_any_cache_a_graph_still_collects_what_it_sampled(server_with):
    server = server_with("--cache-none")
    for _ in range(2):  # nothing is kept from one prompt to the next
        graph = Calibrating()
        graph.save(graph.collect(graph.capture_all((1, 2), 3)), "uncached")
        server.run(graph)
        assert len(manifest(server, "uncached")["layers"]) == 44 and len(manifest(server, "uncached")["runs"]) == 2
