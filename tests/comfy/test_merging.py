"""Merging, hooks, LoRAs and savers on quantized models: patch_script.py's checks, and the stock nodes in a server."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from comfy_server import COMFYUI, PYTHON, ROOT, Graph, missing, relative_error
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.pipeline.request import Request
from comfyui_quantpress.quant_core.pipeline.run import convert
from comfyui_quantpress.quant_core.policy.recipe import Recipe
from comfyui_quantpress.quant_core.stored.layers import stored_layers
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).with_name("patch_script.py")
CHECKS = [name for name in re.findall(r"^def (\w+)\(\):", SCRIPT.read_text("utf-8"), re.MULTILINE)]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
# One of each kind: ComfyUI's own, ours, rotated, 4 bits with two scales, and one that comfy-kitchen cannot round into.
FORMATS = ("float8_e4m3fn", "int8_convrot", "nvfp4", "float8_e4m3fn_rowwise", "int8_blockwise", "bnb_nf4", "awq_w4a16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    if missing():
        pytest.skip(missing())
    folder = tmp_path_factory.mktemp("merging")
    state = load_file(ROOT / "assets/tiny_mmdit_256.safetensors")
    save_file(state, folder / "plain.safetensors")
    generator = torch.Generator().manual_seed(3)
    other = {
        name: (tensor * (1 + 0.3 * torch.randn(tensor.shape, generator=generator))).to(tensor.dtype)
        for name, tensor in state.items()
    }
    save_file(other, folder / "other.safetensors")
    for name in FORMATS:
        convert(Request(folder / "plain.safetensors", folder / f"{name}.safetensors", Recipe(get_format(name))))
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_models_with_quantized_layers(check, folder):
    done = subprocess.run(
        [PYTHON, SCRIPT, COMFYUI, ROOT, check, folder],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **ENVIRONMENT},
        cwd=SCRIPT.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def listed(server, folder) -> None:
    for name in ("plain", "other", "int8_blockwise", "nvfp4"):
        os.link(folder / f"{name}.safetensors", server.base / f"models/diffusion_models/merging_{name}.safetensors")


@pytest.mark.parametrize("first", ["plain", "int8_blockwise", "nvfp4"])
@pytest.mark.parametrize("second", ["other", "int8_blockwise", "nvfp4"])
def test_merge_models_samples_as_the_merge_of_the_plain_models(server, listed, first, second):
    graph = Graph()
    wanted = "other" if second == "other" else "plain"
    for name, one, two in (("merged", first, second), ("plain", "plain", wanted)):
        models = [graph.unet(f"merging_{file}.safetensors") for file in (one, two)]
        merge = graph.add("ModelMergeSimple", model1=(models[0], 0), model2=(models[1], 0), ratio=0.5)
        graph.sample(merge, graph.unet("merging_plain.safetensors"), f"merging/{first}_{second}/{name}", steps=1)
    server.run(graph)
    latents = [server.latent(f"merging/{first}_{second}/{name}") for name in ("merged", "plain")]
    assert relative_error(*latents) < (0.35 if "nvfp4" in (first, second) else 0.1)


def test_a_hooked_lora_runs_on_a_quantized_model(server, listed, folder):
    layers = [name for name in load_file(folder / "int8_blockwise.safetensors") if name.endswith(".weight_scale")]
    lora = {}
    for layer in (name.removesuffix(".weight_scale") for name in layers):
        n, k = load_file(folder / "plain.safetensors")[f"{layer}.weight"].shape
        lora |= {f"diffusion_model.{layer}.lora_up.weight": torch.full((n, 1), 0.02)}
        lora |= {f"diffusion_model.{layer}.lora_down.weight": torch.ones(1, k) * 0.1}
    save_file(lora, server.base / "models/loras/hooked.safetensors")
    for name in ("int8_blockwise", "plain"):
        graph = Graph()
        model = graph.unet(f"merging_{name}.safetensors")
        hook = graph.add("CreateHookLoraModelOnly", lora_name="hooked.safetensors", strength_model=1.0)
        graph.sample(model, model, f"merging/hook_{name}", steps=2)
        sampler = next(node for node in graph.nodes.values() if node["class_type"] == "KSampler")
        hooked = graph.add(
            "ConditioningSetProperties",
            cond_NEW=sampler["inputs"]["positive"],
            strength=1.0,
            set_cond_area="default",
            hooks=(hook, 0),
        )
        sampler["inputs"]["positive"] = [hooked, 0]
        graph.sample(model, model, f"merging/nohook_{name}", steps=2)
        server.run(graph)
    with_hook, plain = server.latent("merging/hook_int8_blockwise"), server.latent("merging/hook_plain")
    without = server.latent("merging/nohook_int8_blockwise")
    assert relative_error(with_hook, plain) < 0.1
    assert relative_error(without, server.latent("merging/nohook_plain")) < 0.1  # the weights are restored
    assert relative_error(with_hook, without) > 2 * relative_error(with_hook, plain)


@pytest.mark.parametrize("first", ["int8_blockwise", "nvfp4"])
def test_model_from_graph_merges_decoded_weights_and_rounds_nothing(server, listed, folder, first):
    graph = Graph()
    models = [graph.unet(f"merging_{file}.safetensors") for file in (first, "other")]
    merge = graph.add("ModelMergeSimple", model1=(models[0], 0), model2=(models[1], 0), ratio=0.25)
    node = graph.add("QuantPressModelSource", model=(merge, 0), bake_loras=True)
    graph.add(
        "QuantPressSaveSource", source=(node, 0), folder="diffusion_models", name=f"merged_{first}", overwrite=True
    )
    graph.sample(models[0], models[0], f"merging/after_{first}", steps=1)
    alone = Graph()
    alone.sample(
        alone.unet(f"merging_{first}.safetensors"), alone.unet("merging_plain.safetensors"), f"alone_{first}", 1
    )
    text = server.run(graph)[node]["text"][0]
    server.run(alone)
    assert "quantized layers are written decoded" in text
    with open_source(folder / f"{first}.safetensors") as src:
        one = {f"{name}.weight": layer.decode(src) for name, layer in stored_layers(src).items()}
        one |= {
            name: src.read(name) for name in src.tensors if name not in one and name.endswith((".weight", ".bias"))
        }
    merged = load_file(server.base / f"models/diffusion_models/merged_{first}.safetensors")
    other = load_file(folder / "other.safetensors")
    for name, tensor in merged.items():
        key = name.removeprefix("model.diffusion_model.")
        if not name.endswith((".weight", ".bias")):
            assert key in other, name  # no scale is left over
            continue
        wanted = 0.25 * one[key].double() + 0.75 * other[key].double()
        assert relative_error(tensor.double(), wanted) < 0.004, name  # bf16
    assert torch.equal(
        server.latent(f"merging/after_{first}"), server.latent(f"alone_{first}")
    )  # nothing stays patched
