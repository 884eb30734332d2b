"""The stock TorchCompileModel node on models in our formats: the same latent as without it."""

import os
import shutil

import pytest
from comfy_server import ROOT, Graph, relative_error
from comfyui_quantpress.quant_core.formats import all_formats
from comfyui_quantpress.quant_core.pipeline.request import Request
from comfyui_quantpress.quant_core.pipeline.run import convert
from comfyui_quantpress.quant_core.policy.recipe import Recipe

OURS = [fmt for fmt in all_formats() if fmt.runtime.native_since is None]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler: install g++ or clang++, or set CXX")
@pytest.mark.parametrize("fmt", OURS, ids=lambda fmt: fmt.name)
def test_a_compiled_model_draws_what_it_draws_uncompiled(fmt, server):
    name = f"compiled_{fmt.name}.safetensors"
    target = server.base / "models/diffusion_models" / name
    convert(Request(ROOT / "assets/tiny_mmdit_256.safetensors", target, Recipe(fmt)))
    graph = Graph()
    model = graph.unet(name)
    compiled = graph.add("TorchCompileModel", model=(model, 0), backend="inductor")
    graph.sample(model, model, f"compile/{fmt.name}_plain", steps=2)
    graph.sample(compiled, model, f"compile/{fmt.name}_compiled", steps=2)
    server.run(graph)
    latents = [server.latent(f"compile/{fmt.name}_{name}") for name in ("compiled", "plain")]
    assert relative_error(*latents) < 2e-3
