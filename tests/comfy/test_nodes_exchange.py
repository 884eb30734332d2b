"""Checkpoint tools in a running ComfyUI: formats into each other, bitsandbytes, LoRAs, checkpoints and shards.

The rarer settings of Quantize Model are here, too.
"""

import json
import re
import time

import pytest
import torch
from comfy_server import Graph, WorkflowError, relative_error
from comfyui_quantpress.quant_core.checkpoint.metadata import encode_config
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.tools.lora import bake
from safetensors import safe_open
from safetensors.torch import load_file, save_file

RECIPE = {
    "group_size": "automatic",
    "scales": "absmax",
    "rounding": "nearest",
    "seed": 0,
    "keep": "",
    "only": "",
    "fallback": "keep in source dtype",
    "device": "auto",
}
PREFIX = "model.diffusion_model."


def folder(server, name="diffusion_models"):
    return server.base / "models" / name


def open_file(graph, file, where="diffusion_models"):
    return graph.add("QuantPressOpenFile", file=f"{where}/{file}")


def requantize(graph, quantized, **recipe):
    return graph.add("QuantPressRequantize", quantized=(quantized, 0), **{**RECIPE, **recipe})


def save(graph, quantized, name, where="diffusion_models"):
    return graph.add("QuantPressSave", quantized=(quantized, 0), folder=where, name=name, overwrite=True)


def in_graph(graph, quantized):
    return graph.add("QuantPressLoadQuantized", quantized=(quantized, 0))


def failure(server, graph, output):
    """The error of the graph that ends in this node's first output."""
    graph.add("QuantPressSplitShards", model=(output, 0), folder="output", name="never/{time}", max_gb=1.0)
    with pytest.raises(WorkflowError) as failed:
        server.run(graph)
    assert not list((server.base / "output/never").glob("*"))
    return failed.value


@pytest.fixture(scope="module")
def nf4(server):
    """The trained model in NF4 as a file, and its latent."""
    graph = Graph()
    quantized = graph.quantize(graph.source("trained_sd3"), format="bnb_nf4")
    save(graph, quantized, "exchange/nf4")
    graph.sample(in_graph(graph, quantized), graph.unet("trained_sd3.safetensors"), "exchange/nf4", steps=1)
    server.run(graph)
    return server.latent("exchange/nf4")


# --- formats into each other ---------------------------------------------------------------------------------------


def test_requantizing_gives_the_other_format_and_tells_what_it_adds(server, nf4):
    graph = Graph()
    node = requantize(graph, open_file(graph, "exchange/nf4.safetensors"), format="int8_rowwise")
    save(graph, node, "exchange/{model}-{format}")
    graph.sample(in_graph(graph, node), graph.unet("trained_sd3.safetensors"), "exchange/requantized", steps=1)
    text = server.run(graph)[node]["text"][0]
    assert (
        "was: 29 x bnb_nf4" in text
        and "29 x int8_rowwise" in text
        and "added error against the decoded source" in text
    )
    assert "15 x not quantized before" in text and "only" not in text
    assert relative_error(server.latent("exchange/requantized"), nf4) < 0.03
    assert (folder(server) / "exchange/nf4-int8_rowwise.safetensors").is_file()


def test_requantizing_takes_the_recipes_own_choice_of_layers(server, nf4):
    graph = Graph()
    node = requantize(
        graph, open_file(graph, "exchange/nf4.safetensors"), format="mxfp8", only=r"attn\.qkv", keep=r"\.3\."
    )
    graph.add("QuantPressInspect", file="(the connected model)", quantized=(node, 0))
    text = server.run(graph)[node]["text"][0]
    assert "6 x mxfp8" in text and "not named in only" in text and r"named in keep (\.3\.)" in text


def test_requantizing_what_is_not_quantized_says_so(server):
    graph = Graph()
    error = failure(server, graph, requantize(graph, open_file(graph, "trained_sd3.safetensors"), format="nvfp4"))
    assert error.node == "QuantPressRequantize" and "nothing in it is quantized. Quantize it instead" in error.message


@pytest.fixture(scope="module")
def packed_flux(server):
    """A Flux with every matrix packed, those that ComfyUI looks at too, as other tools write them."""
    target, fmt = folder(server) / "packed_flux.safetensors", get_format("bnb_nf4")
    tensors = {}
    for name, tensor in load_file(folder(server) / "random_flux.safetensors").items():
        layer = name.removesuffix(".weight")
        if name == layer or tensor.dim() != 2 or not re.search("blocks|_in", name) or fmt.problem(tensor.shape):
            tensors[name] = tensor
            continue
        tensors |= {f"{layer}.{suffix}": part for suffix, part in fmt.quantize(tensor.float()).items()}
        tensors[f"{layer}.comfy_quant"] = encode_config(fmt.config(tuple(tensor.shape), torch.bfloat16))
    save_file(tensors, target)
    return target.name


def test_a_file_that_comfyui_cannot_recognise_becomes_one_that_it_does(server, packed_flux):
    graph = Graph()
    node = requantize(graph, open_file(graph, packed_flux), format="bnb_nf4", fallback="int8_rowwise")
    graph.sample(in_graph(graph, node), graph.unet("random_flux.safetensors"), "exchange/flux", steps=1)
    text = server.run(graph)[node]["text"][0]
    assert (
        text.splitlines()[2].startswith("FluxSchnell") and "x int8_rowwise" in text and "layers lost nothing" in text
    )


def test_packed_layers_that_comfyui_looks_at_are_decoded_without_a_fallback(server, packed_flux):
    graph = Graph()
    node = requantize(graph, open_file(graph, packed_flux), format="bnb_nf4")
    graph.sample(in_graph(graph, node), graph.unet("random_flux.safetensors"), "exchange/flux_decoded", steps=1)
    text = server.run(graph)[node]["text"][0]
    assert "decoded to bf16" in text and "FluxSchnell" in text


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_dequantized_model_samples_as_the_quantized_one(server, nf4, dtype):
    graph = Graph()
    node = graph.add("QuantPressDequantize", quantized=(open_file(graph, "exchange/nf4.safetensors"), 0), dtype=dtype)
    saved = graph.add(
        "QuantPressSaveSource", source=(node, 0), folder="diffusion_models", name="exchange/{model}", overwrite=True
    )
    graph.sample(graph.unet((saved, 0)), graph.unet("trained_sd3.safetensors"), f"exchange/{dtype}", steps=1)
    outputs = server.run(graph)
    assert "decoded to " + dtype + ": 29 x bnb_nf4" in outputs[node]["text"][0] and "SD3" in outputs[node]["text"][0]
    assert f"saved diffusion_models/exchange/nf4-{dtype}.safetensors" in outputs[saved]["text"][0]
    assert relative_error(server.latent(f"exchange/{dtype}"), nf4) < 0.02
    assert not any("comfy_quant" in name for name in load_file(folder(server) / f"exchange/nf4-{dtype}.safetensors"))


def test_dequantizing_a_plain_file_says_so(server):
    graph = Graph()
    error = failure(
        server,
        graph,
        graph.add("QuantPressDequantize", quantized=(open_file(graph, "trained_sd3.safetensors"), 0), dtype="fp16"),
    )
    assert (
        error.node == "QuantPressDequantize" and "nothing in it is quantized. Use the file as it is" in error.message
    )


# --- bitsandbytes --------------------------------------------------------------------------------------------------


def bitsandbytes(graph, quantized, direction, nested=False):
    return graph.add("QuantPressBitsandbytes", quantized=(quantized, 0), direction=direction, nested=nested)


@pytest.mark.parametrize("nested", [False, True])
def test_there_and_back_through_bitsandbytes(server, nf4, nested):
    name, graph = f"exchange/bnb-{nested}", Graph()
    save(graph, bitsandbytes(graph, open_file(graph, "exchange/nf4.safetensors"), "export", nested), name)
    server.run(graph)
    tensors = load_file(folder(server) / f"{name}.safetensors")
    assert sum(key.endswith("bitsandbytes__nf4") for key in tensors) == 29
    assert sum(key.endswith("nested_absmax") for key in tensors) == 29 * nested
    graph = Graph()
    node = bitsandbytes(graph, open_file(graph, f"{name}.safetensors"), "import")
    graph.sample(in_graph(graph, node), graph.unet("trained_sd3.safetensors"), name, steps=1)
    text = server.run(graph)[node]["text"][0]
    assert "warning" not in text and "29 layers: bitsandbytes bnb_nf4 -> comfy_quant" in text
    assert (
        relative_error(server.latent(name), nf4) == 0
        if not nested
        else 0 < relative_error(server.latent(name), nf4) < 0.02
    )


def test_an_import_says_when_comfyui_will_not_recognise_the_model(server, packed_flux):
    graph = Graph()
    save(graph, bitsandbytes(graph, open_file(graph, packed_flux), "export"), "exchange/bnb_flux")
    server.run(graph)
    graph = Graph()
    imported = bitsandbytes(graph, open_file(graph, "exchange/bnb_flux.safetensors"), "import")
    node = requantize(graph, imported, format="bnb_nf4", fallback="int8_rowwise")
    graph.sample(in_graph(graph, node), graph.unet("random_flux.safetensors"), "exchange/bnb_flux", steps=1)
    text = server.run(graph)[imported]["text"][0]
    assert "ComfyUI will not recognise the result as FluxSchnell" in text and "Requantize" in text


def test_an_export_of_what_bitsandbytes_has_not_is_refused(server):
    graph = Graph()
    error = failure(
        server,
        graph,
        bitsandbytes(graph, graph.quantize(graph.source("trained_sd3"), format="int8_rowwise"), "export"),
    )
    assert error.node == "QuantPressBitsandbytes" and "in formats that bitsandbytes has not" in error.message


def test_an_import_passes_on_what_needs_none(server):
    graph = Graph()
    node = bitsandbytes(graph, graph.quantize(graph.source("trained_sd3"), format="int8_rowwise"), "import")
    save(graph, node, "exchange/no_import")
    text = server.run(graph)[node]["text"][0]
    assert (
        "nothing to import: its 29 quantized layers are in ComfyUI's own form (int8_rowwise)" in text
        and "goes on as it is" in text
    )
    assert (folder(server) / "exchange/no_import.safetensors").is_file()


# --- LoRAs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(server):
    """Two LoRAs of the trained model, with kohya's names and with ComfyUI's."""
    state, generator = load_file(folder(server) / "trained_sd3.safetensors"), torch.Generator().manual_seed(8)
    layers = [
        name.removesuffix(".weight")
        for name in state
        if name.startswith("joint_blocks.") and name.endswith("fc1.weight")
    ]
    for number, name in enumerate(("one", "two")):
        tensors = {}
        for layer in layers:
            n, k = state[f"{layer}.weight"].shape
            base = f"lora_unet_{layer.replace('.', '_')}" if number == 0 else f"diffusion_model.{layer}"
            tensors[f"{base}.lora_down.weight"] = torch.randn(4, k, generator=generator) / k**0.5
            tensors[f"{base}.lora_up.weight"] = (
                torch.randn(n, 4, generator=generator) * float(state[f"{layer}.weight"].float().std()) * 6
            )
            tensors[f"{base}.alpha"] = torch.tensor(4.0)
        save_file(tensors, folder(server, "loras") / f"{name}.safetensors")
    save_file(
        {
            "lora_unet_no_such_layer.lora_down.weight": torch.ones(1, 4),
            "lora_unet_no_such_layer.lora_up.weight": torch.ones(4, 1),
        }
        | {
            f"lora_unet_joint_blocks_0_x_block_mlp_fc1.{part}.weight": torch.zeros(shape)
            for part, shape in (("lora_down", (1, 256)), ("lora_up", (1024, 1)))
        },
        folder(server, "loras") / "partly.safetensors",
    )


def bake_lora(graph, source, name, strength=1.0, skip=False):
    return graph.add(
        "QuantPressBakeLora",
        source=(source, 0),
        lora_name=f"{name}.safetensors",
        strength=strength,
        skip_unmatched=skip,
    )


def test_baked_loras_equal_those_of_the_stock_loader_and_are_rounded_once(server, loras):
    graph = Graph()
    first = bake_lora(graph, graph.source("trained_sd3"), "one", 0.7)
    second = bake_lora(graph, first, "two", -0.5)
    saved = graph.add(
        "QuantPressSaveSource", source=(second, 0), folder="diffusion_models", name="exchange/{model}", overwrite=True
    )
    plain = graph.unet("trained_sd3.safetensors")
    graph.sample(graph.unet((saved, 0)), plain, "exchange/baked", steps=1)
    patched = plain
    for name, strength in (("one", 0.7), ("two", -0.5)):
        patched = graph.add(
            "LoraLoaderModelOnly", model=(patched, 0), lora_name=f"{name}.safetensors", strength_model=strength
        )
    graph.sample(patched, plain, "exchange/patched", steps=1)
    graph.sample(plain, plain, "exchange/plain", steps=1)
    outputs = server.run(graph)
    assert "7 weights changed" in outputs[first]["text"][0] and "rounded once" in outputs[second]["text"][0]
    baked, patched = server.latent("exchange/baked"), server.latent("exchange/patched")
    assert relative_error(baked, patched) < 0.02 < 0.1 < relative_error(server.latent("exchange/plain"), patched)
    reference = server.base / "reference.safetensors"
    with (
        open_source(folder(server) / "trained_sd3.safetensors") as src,
        open_source(folder(server, "loras") / "one.safetensors") as one,
        open_source(folder(server, "loras") / "two.safetensors") as two,
    ):
        bake(src, [(one, 0.7), (two, -0.5)]).apply(reference)
    with (
        open_source(reference) as expected,
        open_source(folder(server) / "exchange/trained_sd3-one-two.safetensors") as written,
    ):
        assert expected.metadata == written.metadata
        assert all(torch.equal(expected.read(name), written.read(name)) for name in expected.tensors)


def test_layers_that_the_model_has_not_are_named_or_left_out_on_demand(server, loras):
    graph = Graph()
    error = failure(server, graph, bake_lora(graph, graph.source("trained_sd3"), "partly"))
    assert (
        error.node == "QuantPressBakeLora"
        and "no_such_layer" in error.message
        and "switch on skip_unmatched" in error.message
    )
    graph = Graph()
    node = bake_lora(graph, bake_lora(graph, graph.source("trained_sd3"), "partly", skip=True), "one")
    graph.add("QuantPressSaveSource", source=(node, 0), folder="output", name="partly", overwrite=True)
    outputs = server.run(graph)
    assert "no_such_layer" in outputs["2"]["text"][0] and "Left out" in outputs["2"]["text"][0]


def test_a_quantized_source_takes_no_lora(server, loras, nf4):
    graph = Graph()
    error = failure(server, graph, bake_lora(graph, graph.source("exchange/nf4"), "one"))
    assert "is quantized (bnb_nf4)" in error.message and "dequantize it first" in error.message


# --- checkpoints and shards ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(server):
    """A full checkpoint around the trained model; its VAE is none that ComfyUI knows, which only makes it unused."""
    tensors = {PREFIX + name: t for name, t in load_file(folder(server) / "trained_sd3.safetensors").items()}
    rest = {"first_stage_model.extra.weight": torch.randn(8, 8), "text_encoders.extra.logit_scale": torch.tensor(1.5)}
    save_file(tensors | rest, folder(server, "checkpoints") / "full.safetensors", {"format": "pt", "note": "kept"})
    return rest


def test_a_model_goes_out_of_a_checkpoint_and_back_quantized(server, checkpoint):
    graph = Graph()
    out = graph.add(
        "QuantPressExtractModel",
        source=(graph.add("QuantPressLoadSource", file="checkpoints/full.safetensors"), 0),
        prefix="",
    )
    quantized = graph.quantize(out, format="int8_blockwise")
    back = graph.add(
        "QuantPressReplaceModel",
        model=(quantized, 0),
        checkpoint="checkpoints/full.safetensors",
        prefix="",
        allow_differences=False,
    )
    saved = save(graph, back, "full-int8", "checkpoints")
    graph.add(
        "QuantPressSaveSource", source=(out, 0), folder="diffusion_models", name="exchange/alone", overwrite=True
    )
    graph.sample(in_graph(graph, quantized), graph.unet("trained_sd3.safetensors"), "exchange/alone", steps=1)
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=(saved, 0))
    graph.sample(loaded, loaded, "exchange/checkpoint", steps=1)
    outputs = server.run(graph)
    assert (
        "SD3: 107 tensors under 'model.diffusion_model.'" in outputs[out]["text"][0]
        and "2 others left out" in outputs[out]["text"][0]
    )
    assert outputs[back]["text"][0].startswith("SD3: full in the place of the diffusion model in full.safetensors")
    assert (server.latent("exchange/alone") == server.latent("exchange/checkpoint")).all()
    written, original = (
        load_file(folder(server, where) / name)
        for where, name in (
            ("checkpoints", "full-int8.safetensors"),
            ("diffusion_models", "exchange/alone.safetensors"),
        )
    )
    assert all(torch.equal(written[name], tensor) for name, tensor in checkpoint.items())
    plain = load_file(folder(server) / "trained_sd3.safetensors")
    assert set(original) == set(plain) and all(torch.equal(original[name], plain[name]) for name in plain)
    with safe_open(folder(server, "checkpoints") / "full-int8.safetensors", "pt") as file:
        assert file.metadata()["note"] == "kept"


def test_what_is_no_checkpoint_and_what_is_another_model_is_said(server, checkpoint):
    graph = Graph()
    error = failure(
        server, graph, graph.add("QuantPressExtractModel", source=(graph.source("trained_sd3"), 0), prefix="")
    )
    assert error.node == "QuantPressExtractModel" and "it is not a full checkpoint of a known model" in error.message
    graph = Graph()
    error = failure(
        server,
        graph,
        graph.add(
            "QuantPressReplaceModel",
            model=(graph.source("random_flux"), 0),
            prefix="",
            checkpoint="checkpoints/full.safetensors",
            allow_differences=False,
        ),
    )
    assert error.kind == "PlanError" and "these the same model?" in error.message and "double_blocks" in error.message


def test_shards_are_written_with_an_index_and_become_one_file_again(server):
    graph = Graph()
    node = graph.add(
        "QuantPressSplitShards",
        model=(graph.source("random_flux"), 0),
        folder="diffusion_models",
        name="{model}-parts/m",
        max_gb=0.003,
    )
    outputs = server.run(graph)
    shards = sorted(path.name for path in (folder(server) / "random_flux-parts").iterdir())
    count = len(shards) - 1
    assert count > 1 and shards == [
        *(f"m-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)),
        "m.safetensors.index.json",
    ]
    assert f"{count} shards of at most 0.00" in outputs[node]["text"][0]
    again = Graph()
    again.add(
        "QuantPressSplitShards",
        model=(again.source("random_flux"), 0),
        folder="diffusion_models",
        name="random_flux-parts/m",
        max_gb=5,
    )
    with pytest.raises(WorkflowError, match="there are shards of this name already"):
        server.run(again)
    graph = Graph()
    source = graph.add("QuantPressLoadSource", file="diffusion_models/random_flux-parts/m.safetensors.index.json")
    graph.add("QuantPressSaveSource", source=(source, 0), folder="output", name="joined", overwrite=True)
    server.run(graph)
    joined, original = (
        load_file(server.base / "output/joined.safetensors"),
        load_file(folder(server) / "random_flux.safetensors"),
    )
    assert set(joined) == set(original) and all(torch.equal(joined[name], original[name]) for name in original)


def test_a_layer_that_is_larger_than_a_shard_is_named(server):
    graph = Graph()
    graph.add(
        "QuantPressSplitShards", model=(graph.source("random_wan"), 0), folder="output", name="tiny/m", max_gb=0.001
    )
    with pytest.raises(WorkflowError, match=r"text_embedding.0 alone takes .* Set max_gb higher"):
        server.run(graph)
    assert not list((server.base / "output/tiny").iterdir())


@pytest.mark.parametrize("kind", ["QuantPressBakeLora", "QuantPressSplitShards"])
def test_cancel_leaves_no_half_written_file(server, kind):
    if not (folder(server) / "wide.safetensors").exists():
        save_file(
            {f"blocks.{i}.lin.weight": torch.full((4096, 2048), i / 8, dtype=torch.bfloat16) for i in range(32)},
            folder(server) / "wide.safetensors",
        )
        save_file(
            {
                f"diffusion_model.blocks.{i}.lin.{part}.weight": torch.full(shape, 0.01)
                for i in range(32)
                for part, shape in (("lora_down", (4, 2048)), ("lora_up", (4096, 4)))
            },
            folder(server, "loras") / "wide.safetensors",
        )
    graph = Graph()
    if kind == "QuantPressBakeLora":
        where, node = server.base / "temp/quantpress", bake_lora(graph, graph.source("wide"), "wide")
        graph.add("QuantPressSplitShards", model=(node, 0), folder="output", name="never/wide", max_gb=1.0)
    else:
        where = server.base / "output/wide"
        graph.add(
            "QuantPressSplitShards", model=(graph.source("wide"), 0), folder="output", name="wide/wide", max_gb=0.02
        )
    prompt, end = server.submit(graph), time.monotonic() + 60
    while not list(where.glob(".wide*.part")):  # it writes: the run is in the middle
        assert time.monotonic() < end, "writing never began"
        time.sleep(0.01)
    server.call("/interrupt", {})
    started = time.monotonic()
    with pytest.raises(WorkflowError) as stopped:
        server.wait(prompt)
    assert stopped.value.kind == "interrupted" and stopped.value.node == kind and time.monotonic() - started < 4
    assert [path for path in where.iterdir() if "wide" in path.name] == []


# --- the rarer settings of Quantize Model --------------------------------------------------------------------------


def formats(path):
    """{layer: format} of a file."""
    with safe_open(path, "pt") as file:
        return {
            name.removesuffix(".comfy_quant"): json.loads(bytes(file.get_tensor(name).tolist()))["format"]
            for name in file.keys()  # noqa: SIM118 - safe_open cannot be iterated
            if name.endswith(".comfy_quant")
        }


def test_a_layer_config_gives_single_layers_their_own_format(server):
    config = {r"x_block\.attn": {"format": "int8_rowwise"}, r"joint_blocks\.0\.": {"skip": True}}
    graph = Graph()
    save(
        graph,
        graph.quantize(graph.source("trained_sd3"), format="bnb_nf4", layer_config=json.dumps(config)),
        "exchange/mixed",
    )
    server.run(graph)
    found = formats(folder(server) / "exchange/mixed.safetensors")
    assert not any(layer.startswith("joint_blocks.0.") for layer in found)
    assert {fmt for layer, fmt in found.items() if "x_block.attn" in layer} == {
        "int8_tensorwise"
    }  # per row, as ComfyUI calls it
    assert {fmt for layer, fmt in found.items() if "x_block.mlp" in layer} == {"bnb_nf4"}


@pytest.mark.parametrize(
    "config, said",
    [
        ('{"attn": {"format": "int8_rowwise"}', "layer_config is not"),
        ('{"attn": {"fromat": "nvfp4"}}', "there is no setting 'fromat'"),
        ('{"nowhere": {"skip": true}}', "layer_config 'nowhere' matches none of the"),
        ('{"attn": {"format": "int9"}}', "int9"),
    ],
)
def test_a_mistake_in_the_layer_config_is_named(server, config, said):
    graph = Graph()
    error = failure(server, graph, graph.quantize(graph.source("trained_sd3"), layer_config=config))
    assert error.node == "QuantPressQuantize" and said in error.message


def test_a_preset_keeps_more_and_one_of_another_family_is_refused(server):
    graph = Graph()
    node = graph.quantize(graph.source("random_flux"), format="nvfp4", preset="nerf_large", only="txt_in|blocks")
    save(graph, node, "exchange/preset")
    assert "named in keep (txt_in)" in server.run(graph)[node]["text"][0].replace("\\", "")
    graph = Graph()
    error = failure(server, graph, graph.quantize(graph.source("random_flux"), preset="ltxv2"))
    assert "preset ltxv2 names none of this model's layers" in error.message


def test_the_residual_lora_brings_the_picture_closer(server):
    graph = Graph()
    quantized = graph.quantize(graph.source("trained_sd3"), format="bnb_nf4", residual_lora=128)
    saved = save(graph, quantized, "exchange/{model}-with")
    plain, model = graph.unet("trained_sd3.safetensors"), graph.unet((saved, 0))
    corrected = graph.add("LoraLoaderBypassModelOnly", model=(model, 0), lora_name=(saved, 1), strength_model=1.0)
    for name, node in (("plain", plain), ("without", model), ("with", corrected)):
        graph.sample(node, plain, f"residual/{name}", steps=1)
    outputs = server.run(graph)
    assert "saved loras/exchange/trained_sd3-with-residual.safetensors" in outputs[saved]["text"][0]
    assert "residual LoRA: 29 layers" in outputs[quantized]["text"][0]
    listed = server.call("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
    assert "exchange/trained_sd3-with-residual.safetensors" in listed
    reference = server.latent("residual/plain")
    assert relative_error(server.latent("residual/with"), reference) < 0.7 * relative_error(
        server.latent("residual/without"), reference
    )


def test_a_residual_lora_on_gptq_is_warned_of(server):
    graph = Graph()
    node = graph.quantize(
        graph.source("random_flux"),
        format="bnb_nf4",
        only=r"double_blocks\.0\.img_attn\.proj",
        rounding="gptq",
        residual_lora=4,
    )
    graph.add("QuantPressInspect", file="(the connected model)", quantized=(node, 0))
    assert "warning: The residual LoRA stands on gptq" in server.run(graph)[node]["text"][0]


def test_a_model_without_residual_lora_sends_nothing_to_its_lora_output(server):
    graph = Graph()
    saved = save(graph, graph.quantize(graph.source("trained_sd3"), format="float8_e4m3fn"), "exchange/no_lora")
    model = graph.unet((saved, 0))
    lora = graph.add("LoraLoaderBypassModelOnly", model=(model, 0), lora_name=(saved, 1), strength_model=1.0)
    graph.sample(lora, graph.unet("trained_sd3.safetensors"), "residual/never", steps=1)
    assert saved in server.run(graph)
    assert not list((server.base / "output/residual").glob("never*"))
