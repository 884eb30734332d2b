"""The seam under other ways to run ComfyUI, without what it needs, beside another pack that patches the loaders."""

import pytest
from comfy_server import Graph, WorkflowError, relative_error

FORMATS = ("bnb_nf4", "int8_blockwise", "float8_e4m3fn_rowwise", "int8_convrot")

# What another pack does before ours loads: in its prestartup script, since ComfyUI imports packs in no fixed order.
TOO_OLD = """
import comfy.quant_ops
for entry in comfy.quant_ops.QUANT_ALGOS.values():
    entry.pop("quantize_input", None)
"""
TAKES_THE_LOADERS = """
import comfy.sd
comfy.sd._quantops_auto_patch_installed = True
def load_diffusion_model(path, *args, **kwargs):
    raise RuntimeError("taken over by another pack")
comfy.sd.load_diffusion_model = load_diffusion_model
"""
WRAPS_AGAIN = """
import comfy.ops
original = comfy.ops.mixed_precision_ops
comfy.ops.mixed_precision_ops = lambda *args, **kwargs: original(*args, **kwargs)
"""


def pack(name, code):
    def prepare(base):
        folder = base / "custom_nodes" / name
        folder.mkdir()
        (folder / "prestartup_script.py").write_text(code)
        (folder / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}")

    return prepare


def latents(server, formats=FORMATS):
    """{format: latent} of the trained model, each quantized in the graph."""
    for fmt in formats:
        graph = Graph()
        quantized = graph.quantize(graph.source("trained_sd3"), format=fmt)
        model = graph.add("QuantPressLoadQuantized", quantized=(quantized, 0))
        graph.sample(model, model, f"modes/{fmt}", steps=2)
        server.run(graph)
    return {fmt: server.latent(f"modes/{fmt}") for fmt in formats}


@pytest.fixture(scope="module")
def expected(server):
    return latents(server)


@pytest.mark.parametrize("arguments", [("--disable-dynamic-vram",), ("--disable-mmap",)])
def test_the_latents_do_not_depend_on_how_memory_is_managed(server_with, expected, arguments):
    found = latents(server_with(*arguments))
    assert all((found[fmt] == expected[fmt]).all() for fmt in FORMATS)


def test_a_comfyui_without_the_support_says_so_once_and_still_quantizes_and_loads(server_with, expected):
    server = server_with(prepare=pack("0-too-old", TOO_OLD))
    log = server.log_text()
    assert (
        log.count(
            "QuantPress: models in its own formats cannot be loaded here: it is older than 0.29.0. Update ComfyUI"
        )
        == 1
    )
    graph = Graph()
    quantized = graph.quantize(graph.source("trained_sd3"), format="bnb_nf4")
    graph.add("QuantPressSave", quantized=(quantized, 0), folder="diffusion_models", name="old", overwrite=False)
    model = graph.add("QuantPressLoadQuantized", quantized=(quantized, 0))
    graph.sample(model, model, "old", steps=2)
    server.run(graph)
    # The weights are decoded to bf16 instead of float32, so the latents agree closely, not bit for bit.
    assert relative_error(server.latent("old"), expected["bnb_nf4"]) < 0.05


def test_a_pack_that_takes_the_loaders_is_named_and_our_loader_works_beside_it(server_with, expected):
    server = server_with(prepare=pack("0-takes-the-loaders", TAKES_THE_LOADERS))
    assert "ComfyUI-QuantOps is installed too" in server.log_text()
    found = latents(server, ("bnb_nf4",))
    assert (found["bnb_nf4"] == expected["bnb_nf4"]).all()
    graph = Graph()
    graph.add(
        "QuantPressSave",
        quantized=(graph.quantize(graph.source("trained_sd3"), format="bnb_nf4"), 0),
        folder="diffusion_models",
        name="beside",
        overwrite=False,
    )
    server.run(graph)
    graph = Graph()
    unet = graph.unet("beside.safetensors")
    graph.sample(unet, unet, "never")
    with pytest.raises(WorkflowError, match="taken over"):  # the premise: the stock loader is in other hands
        server.run(graph)
    graph = Graph()
    model = graph.add("QuantPressLoadFile", file="diffusion_models/beside.safetensors")
    graph.sample(model, model, "beside", steps=2)
    server.run(graph)
    assert (server.latent("beside") == expected["bnb_nf4"]).all()


def test_a_second_wrap_by_another_pack_changes_nothing(server_with, expected):
    server = server_with(prepare=pack("0-wraps", WRAPS_AGAIN))
    found = latents(server, ("bnb_nf4", "int8_convrot"))
    assert all((found[fmt] == expected[fmt]).all() for fmt in found)
