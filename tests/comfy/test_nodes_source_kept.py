"""No saver of a running ComfyUI replaces a file that its model comes from; and it writes where ComfyUI's own would."""

import os

import pytest
import torch
from comfy_server import Graph, WorkflowError
from safetensors.torch import load_file, save_file

RECIPE = {
    "format": "int8_rowwise",
    "group_size": "automatic",
    "scales": "absmax",
    "rounding": "nearest",
    "seed": 0,
    "keep": "",
    "only": "",
    "fallback": "keep in source dtype",
    "device": "auto",
}
SAME = "the target is the same file as the source"


def models(server, name="diffusion_models"):
    return server.base / "models" / name


@pytest.fixture(scope="module")
def kept(server):
    """A folder of its own: the model, a checkpoint with it, an FP8 file, a LoRA, and shards."""
    folder = models(server) / "kept"
    folder.mkdir()
    state = load_file(models(server) / "trained_sd3.safetensors")
    save_file(state, folder / "source.safetensors")
    vae = {"first_stage_model.x": torch.ones(2)}
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()} | vae,
        models(server, "checkpoints") / "kept_full.safetensors",
    )
    layer = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    save_file(
        {f"{layer}.lora_up.weight": torch.randn(768, 2) * 0.01, f"{layer}.lora_down.weight": torch.randn(2, 256)},
        models(server, "loras") / "kept.safetensors",
    )
    graph = Graph()
    quantized = graph.quantize(graph.source("kept/source"), format="float8_e4m3fn")
    graph.add("QuantPressSave", quantized=(quantized, 0), folder="diffusion_models", name="kept/fp8", overwrite=False)
    graph.add(
        "QuantPressSplitShards",
        model=(graph.source("kept/source"), 0),
        folder="diffusion_models",
        name="kept/parts/model",
        max_gb=0.01,
    )
    server.run(graph)
    return folder


def refused(server, kept, graph, *paths):
    """The graph ends with the command line's sentence, and no file of the user's has changed or come."""
    roots = [models(server), models(server, "checkpoints"), models(server, "loras")]
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for root in roots for p in root.rglob("*") if p.is_file()}
    with pytest.raises(WorkflowError) as failed:
        server.run(graph)
    assert failed.value.kind == "OutputError" and SAME in failed.value.message, failed.value
    assert all(str(path) in failed.value.message for path in paths), failed.value
    after = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for root in roots for p in root.rglob("*") if p.is_file()}
    assert after == before


def save(graph, quantized, name, folder="diffusion_models", overwrite=True):
    return graph.add("QuantPressSave", quantized=(quantized, 0), folder=folder, name=name, overwrite=overwrite)


def save_source(graph, source, name, folder="diffusion_models"):
    return graph.add("QuantPressSaveSource", source=(source, 0), folder=folder, name=name, overwrite=True)


def opened(graph, name="fp8"):
    return graph.add("QuantPressOpenFile", file=f"diffusion_models/kept/{name}.safetensors")


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["kept/{model}", "kept/source", "kept/source.safetensors", "kept/sub/../source"])
def test_the_source_is_kept_under_its_own_name(server, kept, name, overwrite):
    graph = Graph()
    save(graph, graph.quantize(graph.source("kept/source"), format="nvfp4"), name, overwrite=overwrite)
    if ".." in name:
        with pytest.raises(WorkflowError, match="is not a file name"):
            server.run(graph)
        return
    path = kept / "source.safetensors"
    refused(server, kept, graph, path)


@pytest.mark.parametrize("how", ["symlink", "hard link", "linked folder"])
@pytest.mark.parametrize("way", ["source", "target"])
def test_the_source_is_kept_under_another_name(server, kept, how, way):
    link, name = kept / "link.safetensors", "kept/link"
    if how == "linked folder":
        link, name = kept.with_name("kept_link"), "kept_link/source"
        link.symlink_to(kept)
    elif how == "symlink":
        link.symlink_to(kept / "source.safetensors")
    else:
        os.link(kept / "source.safetensors", link)
    source, target = ("kept/source", name) if way == "target" else (name, "kept/source")
    graph = Graph()
    save(graph, graph.quantize(graph.source(source), seed=1), target)
    try:
        refused(
            server, kept, graph, models(server) / f"{source}.safetensors", models(server) / f"{target}.safetensors"
        )
    finally:
        link.unlink()


def quantized_ways(graph):
    """{how: node} of quantized models that come from fp8, or from source."""
    fp8 = opened(graph)
    tools = {
        "opened": fp8,
        "requantized": graph.add("QuantPressRequantize", quantized=(fp8, 0), **RECIPE),
        "edited": graph.add(
            "QuantPressEditMetadata",
            quantized=(fp8, 0),
            add="'full_precision_matrix_mult': true",
            remove="",
            layers="",
            header="update",
            force=False,
            preview=False,
        ),
        "scaled": graph.add(
            "QuantPressInputScales",
            quantized=(fp8, 0),
            method="simulated",
            samples=16,
            percentile=99.9,
            seed=1,
            captured_percentile=100.0,
            lora="none",
            file="none",
            preview=False,
        ),
        "migrated": graph.add(
            "QuantPressMigrate",
            quantized=(fp8, 0),
            target="legacy fp8_scaled",
            full_precision="as it is",
            input_scale="keep",
            hp_filter="",
            header=True,
            preview=False,
        ),
    }
    tools["in two steps"] = graph.add("QuantPressRequantize", quantized=(tools["edited"], 0), **RECIPE)
    loaded = graph.add("QuantPressLoadQuantized", quantized=(tools["requantized"], 0))
    source = graph.add("QuantPressModelSource", model=(loaded, 0), bake_loras=False)
    tools["through the graph"] = graph.quantize(source)
    return tools


@pytest.mark.parametrize("how", [*quantized_ways(Graph())])
def test_a_quantized_file_is_kept_whatever_was_done_to_it(server, kept, how):
    graph = Graph()
    save(graph, quantized_ways(graph)[how], "kept/fp8")
    refused(server, kept, graph, kept / "fp8.safetensors")


def test_a_model_loaded_by_the_stock_loader_keeps_its_file(server, kept):
    graph = Graph()
    node = graph.add("QuantPressModelSource", model=(graph.unet("kept/source.safetensors"), 0), bake_loras=True)
    save(graph, graph.quantize(node), "kept/source")
    refused(server, kept, graph, kept / "source.safetensors")


def test_a_decoded_model_does_not_replace_the_quantized_file(server, kept):
    graph = Graph()
    save_source(graph, graph.add("QuantPressDequantize", quantized=(opened(graph), 0), dtype="bf16"), "kept/fp8")
    refused(server, kept, graph, kept / "fp8.safetensors")


@pytest.mark.parametrize("target", [("diffusion_models", "kept/source"), ("diffusion_models", "kept/lora_link")])
def test_a_baked_model_replaces_neither_its_source_nor_its_lora(server, kept, target):
    lora, link = models(server, "loras") / "kept.safetensors", kept / "lora_link.safetensors"
    link.symlink_to(lora)
    graph = Graph()
    node = graph.add(
        "QuantPressBakeLora",
        source=(graph.source("kept/source"), 0),
        lora_name="kept.safetensors",
        strength=1.0,
        skip_unmatched=False,
    )
    save_source(graph, node, target[1], target[0])
    try:
        refused(server, kept, graph)
    finally:
        link.unlink()


def test_a_checkpoint_is_kept_by_what_comes_out_of_it_and_goes_back(server, kept):
    full = models(server, "checkpoints") / "kept_full.safetensors"
    graph = Graph()
    source = graph.add("QuantPressLoadSource", file="checkpoints/kept_full.safetensors")
    out = graph.add("QuantPressExtractModel", source=(source, 0), prefix="")
    save_source(graph, out, "kept_full", "checkpoints")
    refused(server, kept, graph, full)
    graph = Graph()
    quantized = graph.quantize(graph.source("kept/source"))
    back = graph.add(
        "QuantPressReplaceModel",
        model=(quantized, 0),
        checkpoint="checkpoints/kept_full.safetensors",
        prefix="",
        allow_differences=False,
    )
    save(graph, back, "kept_full", "checkpoints")
    refused(server, kept, graph, full)
    graph.nodes[str(len(graph.nodes))]["inputs"] |= {"folder": "diffusion_models", "name": "kept/source"}
    refused(server, kept, graph, kept / "source.safetensors")


def test_no_shard_and_no_index_is_replaced(server, kept):
    index = "diffusion_models/kept/parts/model.safetensors.index.json"
    shard = sorted((kept / "parts").glob("*.safetensors"))[0]
    for node, inputs in (
        ("QuantPressSaveSource", {"name": f"kept/parts/{shard.stem}", "overwrite": True}),
        ("QuantPressSplitShards", {"name": "kept/parts/model", "max_gb": 1.0}),
    ):
        graph = Graph()
        source = graph.add("QuantPressLoadSource", file=index)
        key = "source" if node == "QuantPressSaveSource" else "model"
        graph.add(node, folder="diffusion_models", **{key: (source, 0)}, **inputs)
        refused(server, kept, graph)
    graph = Graph()
    save(graph, graph.quantize(graph.add("QuantPressLoadSource", file=index)), f"kept/parts/{shard.stem}")
    refused(server, kept, graph, shard)


def test_another_file_is_still_replaced_and_so_is_the_result_itself(server, kept):
    (kept / "old.safetensors").write_bytes(b"old")
    for seed in (1, 2, 2):
        graph = Graph()
        save(graph, graph.quantize(graph.source("kept/source"), format="convrot_w4a4", seed=seed), "kept/old")
        server.run(graph)
    assert len(load_file(kept / "old.safetensors")) > 10


# --- where ComfyUI's own savers and loaders would write and read ---------------------------------------------------


def test_a_linked_subfolder_takes_the_file(server, kept, tmp_path):
    (models(server) / "other disk").symlink_to(tmp_path)
    graph = Graph()
    saved = save(graph, graph.quantize(graph.source("kept/source")), "other disk/new/{model}-{format}")
    graph.sample(graph.unet((saved, 0)), graph.unet("trained_sd3.safetensors"), "kept/linked", steps=1)
    server.run(graph)
    assert (tmp_path / "new/source-int8_convrot.safetensors").is_file() and server.latent(
        "kept/linked"
    ).isfinite().all()


def test_a_suffix_in_capitals_is_quantized_saved_and_loaded(server, kept):
    path = models(server) / "UPPER.SAFETENSORS"
    os.link(kept / "source.safetensors", path)
    graph = Graph()
    source = graph.add("QuantPressLoadSource", file="diffusion_models/UPPER.SAFETENSORS")
    saved = save(graph, graph.quantize(source), "kept/{model}-CAPITALS.SAFETENSORS")
    graph.sample(graph.unet((saved, 0)), graph.unet("UPPER.SAFETENSORS"), "kept/capitals", steps=1)
    server.run(graph)
    assert (kept / "UPPER-CAPITALS.SAFETENSORS").is_file()
    graph = Graph()
    node = graph.add("QuantPressLoadFile", file="diffusion_models/kept/UPPER-CAPITALS.SAFETENSORS")
    graph.sample(node, node, "kept/capitals_ours", steps=1)
    server.run(graph)
    assert torch.equal(server.latent("kept/capitals"), server.latent("kept/capitals_ours"))
    path.unlink()


def test_keep_takes_one_regular_expression_per_line(server, kept):
    graph = Graph()
    node = graph.quantize(graph.source("kept/source"), keep="\n  mlp\\.fc1 \n\n\tattn\\.proj\r\n")
    save(graph, node, "kept/lines")
    text = server.run(graph)[node]["text"][0]
    layers = {name.removesuffix(".comfy_quant") for name in load_file(kept / "lines.safetensors") if "comfy_q" in name}
    assert layers and not any("mlp.fc1" in layer or "attn.proj" in layer for layer in layers), text
    assert any("mlp.fc2" in layer for layer in layers) and any("attn.qkv" in layer for layer in layers)
