"""The nodes in a running ComfyUI: caching, Cancel, LoRAs, saving, all kinds of sources, errors as users see them."""

import json
import time

import pytest
import torch
from comfy_server import Graph, WorkflowError, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def spools(server):
    return {path: path.stat().st_ino for path in (server.base / "temp/quantpress").glob("*.safetensors")}


def quantize_file(server, source="trained_sd3", **recipe):
    """Run Quantize Model alone; the spool file that appeared."""
    before, graph = spools(server), Graph()
    node = graph.quantize(graph.source(source), **recipe)
    graph.add("QuantPressInspect", file="(the connected model)", quantized=(node, 0))
    server.run(graph)
    return set(spools(server)) - set(before)


def test_running_again_with_the_same_inputs_does_not_quantize_again(server):
    recipe = {"source": "random_flux", "format": "float8_e5m2", "seed": 11}
    (spool,) = quantize_file(server, **recipe)
    inode = spool.stat().st_ino
    graph = Graph()  # another graph with other node ids: ComfyUI's own cache does not help here
    graph.add("QuantPressTestConditioning", model=(graph.unet("random_flux.safetensors"), 0), kind="zeros", seed=0)
    node = graph.quantize(graph.source("random_flux"), format="float8_e5m2", seed=11)
    graph.add("QuantPressSave", quantized=(node, 0), folder="output", name="again/{time}-{model}", overwrite=True)
    server.run(graph)
    assert spool.stat().st_ino == inode


def test_changing_the_file_on_disk_quantizes_again(server):
    path = server.base / "models/diffusion_models/changing.safetensors"
    tensors = load_file(server.base / "models/diffusion_models/random_flux.safetensors")
    save_file(tensors, path)
    graph = Graph()
    node = graph.quantize(graph.source("changing"), format="float8_e4m3fn")
    graph.add("QuantPressSave", quantized=(node, 0), folder="output", name="changed", overwrite=True)
    saved = []
    for factor in (1.0, 2.0):
        name = "double_blocks.0.img_mlp.0.weight"
        save_file({**tensors, name: tensors[name] * factor}, path)
        server.run(graph)
        saved.append(
            load_file(server.base / "output/changed.safetensors")["double_blocks.0.img_mlp.0.weight_scale"].item()
        )
    assert saved[1] == pytest.approx(2 * saved[0])


def test_cancel_stops_within_seconds_and_leaves_nothing(server):
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"blocks.{i}.lin.weight": torch.randn(2048, 2048, generator=generator).to(torch.bfloat16) for i in range(16)},
        server.base / "models/diffusion_models/large.safetensors",
    )
    folder = server.base / "temp/quantpress"
    before = set(folder.glob("*")) | set(folder.glob(".*"))
    graph = Graph()
    node = graph.quantize(graph.source("large"), format="asym_w4a8_int8")
    graph.add("QuantPressInspect", file="(the connected model)", quantized=(node, 0))
    prompt = server.submit(graph)
    end = time.monotonic() + 60
    while not list(folder.glob(".large*.part")):  # it writes: the run is in the middle
        assert time.monotonic() < end, "quantizing never began"
        time.sleep(0.02)
    started = time.monotonic()
    server.call("/interrupt", {})
    with pytest.raises(WorkflowError) as stopped:
        server.wait(prompt)
    assert stopped.value.kind == "interrupted"
    assert time.monotonic() - started < 4  # a second of the engine's, on a loaded test machine
    assert {path for path in (*folder.glob("*"), *folder.glob(".*")) if "large" in path.name} <= before


@pytest.mark.parametrize(
    "recipe, said",
    [
        ({"format": "int8_rowwise", "group_size": "64"}, "group_size 64 is not offered by int8_rowwise"),
        ({"format": "nvfp4", "keep": "("}, "is not a regular expression"),
        ({"format": "nvfp4", "only": "no_such_layer"}, "matches none of the"),
    ],
)
def test_a_wrong_recipe_shows_our_message(server, recipe, said):
    graph = Graph()
    node = graph.quantize(graph.source("trained_sd3"), **recipe)
    graph.add("QuantPressInspect", file="(the connected model)", quantized=(node, 0))
    with pytest.raises(WorkflowError) as failed:
        server.run(graph)
    assert failed.value.node == "QuantPressQuantize" and failed.value.kind in ("RequestError", "PlanError")
    assert said in failed.value.message


def test_a_nan_in_the_source_names_the_layer_and_leaves_no_file(server):
    tensors = load_file(server.base / "models/diffusion_models/random_flux.safetensors")
    tensors["single_blocks.0.linear1.weight"][3, 5] = float("nan")
    save_file(tensors, server.base / "models/diffusion_models/nan.safetensors")
    with pytest.raises(WorkflowError, match="single_blocks.0.linear1.weight: 1 of"):
        quantize_file(server, "nan")
    assert not list((server.base / "temp/quantpress").glob("*nan*"))


def test_names_that_lead_out_of_the_folders_are_refused(server, tmp_path):
    (server.base / "models/diffusion_models/linked").symlink_to(tmp_path)  # followed, but not climbed out of
    for name in ("../../evil", "/tmp/evil", "linked/../../evil"):
        graph = Graph()
        node = graph.quantize(graph.source("random_flux"), format="float8_e4m3fn")
        graph.add("QuantPressSave", quantized=(node, 0), folder="diffusion_models", name=name, overwrite=True)
        with pytest.raises(WorkflowError) as failed:
            server.run(graph)
        assert failed.value.node == "QuantPressSave" and "is not a file name" in failed.value.message
    assert not list(tmp_path.iterdir())
    graph = Graph()
    graph.add("QuantPressInspect", file="diffusion_models/../../../etc/passwd.safetensors")
    with pytest.raises(WorkflowError) as refused:
        server.run(graph)
    assert refused.value.kind == "validation"


def test_saving_refuses_to_overwrite_unless_told_and_the_loaders_list_the_file(server):
    graph = Graph()
    node = graph.quantize(graph.source("random_flux"), format="float8_e4m3fn")
    save = graph.add(
        "QuantPressSave",
        quantized=(node, 0),
        folder="diffusion_models",
        name="sub/{model}-{format}-{bits}",
        overwrite=False,
    )
    server.run(graph)
    graph.nodes[save]["inputs"]["name"] = "sub/{model}-{format}-8.0"  # the same file by another spelling
    with pytest.raises(WorkflowError, match="the file exists"):
        server.run(graph)
    graph.nodes[save]["inputs"]["overwrite"] = True
    assert "sub/random_flux-float8_e4m3fn-8.0.safetensors" in server.run(graph)[save]["text"][0]
    listed = server.call("/object_info/UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"][0]
    assert "sub/random_flux-float8_e4m3fn-8.0.safetensors" in listed


def write_lora(server, scale):
    """A LoRA of rank 4 on the trained model's attention and MLPs."""
    state = load_file(server.base / "models/diffusion_models/trained_sd3.safetensors")
    generator, lora = torch.Generator().manual_seed(5), {}
    for name, w in state.items():
        if name.startswith("joint_blocks.") and name.endswith(("qkv.weight", "fc1.weight", "fc2.weight")):
            n, k = w.shape
            layer = "diffusion_model." + name.removesuffix(".weight")
            lora[layer + ".lora_down.weight"] = torch.randn(4, k, generator=generator) / k**0.5
            lora[layer + ".lora_up.weight"] = torch.randn(n, 4, generator=generator) * float(w.float().std()) * scale
    save_file(lora, server.base / "models/loras/test.safetensors")


def lora_delta(server, load, name):
    """Latent with the LoRA minus the latent without it, one step. load: Graph -> id of the node with the model."""
    latents = []
    for strength in (0.0, 1.0):
        graph = Graph()
        model = load(graph)
        patched = graph.add(
            "LoraLoaderModelOnly", model=(model, 0), lora_name="test.safetensors", strength_model=strength
        )
        graph.sample(patched, graph.unet("trained_sd3.safetensors"), f"lora/{name}-{strength}", steps=1)
        server.run(graph)
        latents.append(server.latent(f"lora/{name}-{strength}"))
    return latents[1] - latents[0]


@pytest.fixture(scope="module")
def bf16_delta(server):
    write_lora(server, 6.0)
    return lora_delta(server, lambda graph: graph.unet("trained_sd3.safetensors"), "bf16")


@pytest.mark.parametrize(
    "fmt",
    [
        "float8_e4m3fn_rowwise",
        "float8_e4m3fn_blockwise",
        "float8_e4m3fn_block3d",
        "int8_blockwise",
        "int8_lodewise",
        "bnb_nf4",
        "bnb_fp4",
        "bnb_af4",
        "int8_convrot",
    ],
)
def test_a_lora_moves_a_quantized_model_as_it_moves_the_bf16_model(server, bf16_delta, fmt):
    def load(graph):
        return graph.add(
            "QuantPressLoadQuantized", quantized=(graph.quantize(graph.source("trained_sd3"), format=fmt), 0)
        )

    delta = lora_delta(server, load, fmt)
    cosine = float((delta * bf16_delta).sum() / (delta.norm() * bf16_delta.norm()))
    assert cosine > (0.8 if fmt.startswith("bnb") else 0.97), cosine


def test_baking_a_lora_before_quantizing_equals_quantizing_the_merged_file(server, bf16_delta):
    def load(graph):
        unet = graph.unet("trained_sd3.safetensors")
        lora = graph.add("LoraLoaderModelOnly", model=(unet, 0), lora_name="test.safetensors", strength_model=1.0)
        source = graph.add("QuantPressModelSource", model=(lora, 0), bake_loras=True)
        return graph.add("QuantPressLoadQuantized", quantized=(graph.quantize(source, format="int8_rowwise"), 0))

    graph = Graph()
    graph.sample(load(graph), graph.unet("trained_sd3.safetensors"), "lora/baked", steps=1)
    server.run(graph)
    expected = server.latent("lora/bf16-1.0")
    assert relative_error(server.latent("lora/baked"), expected) < 0.05
    assert relative_error(server.latent("lora/bf16-0.0"), expected) > 0.1  # the LoRA is not a small thing


def test_without_baking_the_lora_is_left_out(server, bf16_delta):
    graph = Graph()
    unet = graph.unet("trained_sd3.safetensors")
    lora = graph.add("LoraLoaderModelOnly", model=(unet, 0), lora_name="test.safetensors", strength_model=1.0)
    source = graph.add("QuantPressModelSource", model=(lora, 0), bake_loras=False)
    loaded = graph.add("QuantPressLoadQuantized", quantized=(graph.quantize(source, format="int8_rowwise"), 0))
    graph.sample(loaded, unet, "lora/unbaked", steps=1)
    server.run(graph)
    assert relative_error(server.latent("lora/unbaked"), server.latent("lora/bf16-0.0")) < 0.05


@pytest.mark.parametrize(
    "fmt", ["bnb_nf4", "int8_blockwise", "float8_e4m3fn_block3d", "int8_convrot", "asym_w4a8_int8"]
)
def test_model_save_round_trips_with_every_field_and_bit(server, fmt):
    graph = Graph()
    quantized = graph.quantize(graph.source("trained_sd3"), format=fmt)
    graph.add(
        "QuantPressSave", quantized=(quantized, 0), folder="output", name=f"modelsave/{fmt}-ours", overwrite=True
    )
    model = graph.add("QuantPressLoadQuantized", quantized=(quantized, 0))
    graph.add("ModelSave", model=(model, 0), filename_prefix=f"modelsave/{fmt}-theirs")
    server.run(graph)
    ours = load_file(server.base / f"output/modelsave/{fmt}-ours.safetensors")
    theirs = load_file(next((server.base / "output/modelsave").glob(f"{fmt}-theirs*")))
    theirs = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in theirs.items()}
    layers = [name.removesuffix(".comfy_quant") for name in ours if name.endswith(".comfy_quant")]
    assert layers and set(ours) == set(theirs)
    for layer in layers:
        for name in (n for n in ours if n.startswith(layer + ".") and not n.endswith(".bias")):
            if name.endswith("comfy_quant"):
                assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(theirs[name].tolist()))
            else:
                assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


def test_formats_mix_in_one_file(server):
    """Wan's blocks.0.ffn.0 may not be packed: it takes the fallback, another format of another kind."""
    for fmt, fallback in (("bnb_nf4", "float8_e4m3fn"), ("nvfp4", "float8_e4m3fn_rowwise")):
        graph, name = Graph(), f"mixed/{fmt}"
        quantized = graph.quantize(graph.source("random_wan"), format=fmt, fallback=fallback)
        saved = graph.add(
            "QuantPressSave", quantized=(quantized, 0), folder="diffusion_models", name=name, overwrite=True
        )
        original = graph.unet("random_wan.safetensors")
        graph.sample(graph.unet((saved, 0)), original, f"{name}-q", video=True)
        graph.sample(original, original, f"{name}-o", video=True)
        server.run(graph)
        with safe_open(server.base / f"models/diffusion_models/{name}.safetensors", "pt") as file:
            formats = {
                json.loads(bytes(file.get_tensor(key).tolist()))["format"]
                for key in file.keys()  # noqa: SIM118 - safe_open cannot be iterated
                if "comfy_quant" in key
            }
        assert formats == {fmt, fallback}
        assert 0 < relative_error(server.latent(f"{name}-q"), server.latent(f"{name}-o")) < 0.5


def test_shards_with_an_index_are_one_source(server):
    tensors = load_file(server.base / "models/diffusion_models/random_flux.safetensors")
    folder = server.base / "models/diffusion_models/sharded"
    folder.mkdir()
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    listed = server.call("/object_info/QuantPressLoadSource")["QuantPressLoadSource"]["input"]["required"]["file"][1][
        "options"
    ]
    assert [name for name in listed if "sharded" in name] == ["diffusion_models/sharded/model.safetensors.index.json"]
    graph = Graph()
    source = graph.add("QuantPressLoadSource", file="diffusion_models/sharded/model.safetensors.index.json")
    for name, node in (("shards", source), ("whole", graph.source("random_flux"))):
        graph.add(
            "QuantPressSave",
            quantized=(graph.quantize(node, format="int8_rowwise"), 0),
            folder="output",
            name=name,
            overwrite=True,
        )
    outputs = server.run(graph)
    assert "FluxSchnell" in outputs[source]["text"][0] and "2 shards" in outputs[source]["text"][0]
    whole, shards = (load_file(server.base / f"output/{name}.safetensors") for name in ("whole", "shards"))
    assert set(whole) == set(shards) and all(torch.equal(whole[name], shards[name]) for name in whole)


def test_inspect_finds_what_a_loader_would_stumble_over(server):
    graph = Graph()
    node = graph.quantize(graph.source("random_flux"), format="bnb_nf4")
    save = graph.add(
        "QuantPressSave", quantized=(node, 0), folder="diffusion_models", name="whole_nf4", overwrite=True
    )
    inspected = graph.add("QuantPressInspect", file="(the connected model)", quantized=(node, 0))
    text = server.run(graph)[inspected]["text"][0]
    assert save and "no problems found" in text and "bnb_nf4" in text and "FluxSchnell" in text
    tensors = load_file(server.base / "models/diffusion_models/whole_nf4.safetensors")
    del tensors["double_blocks.0.img_mlp.0.weight_scale"]
    save_file(tensors, server.base / "models/diffusion_models/broken.safetensors")
    graph = Graph()
    inspected = graph.add("QuantPressInspect", file="diffusion_models/broken.safetensors")
    assert "double_blocks.0.img_mlp.0.weight_scale is missing" in server.run(graph)[inspected]["text"][0]


def test_a_quantized_layer_that_reaches_no_module_is_named(server):
    graph = Graph()
    node = graph.quantize(graph.source("random_flux"), format="bnb_nf4")
    graph.add("QuantPressSave", quantized=(node, 0), folder="diffusion_models", name="to_rename", overwrite=True)
    server.run(graph)
    tensors = load_file(server.base / "models/diffusion_models/to_rename.safetensors")
    renamed = {
        name.replace("single_blocks.0.linear2.", "single_blocks.0.lost."): tensor for name, tensor in tensors.items()
    }
    save_file(renamed, server.base / "models/diffusion_models/renamed.safetensors")
    graph = Graph()
    unet = graph.unet("renamed.safetensors")
    graph.sample(unet, unet, "lost")
    with pytest.raises(WorkflowError, match="single_blocks.0.lost") as failed:
        server.run(graph)
    assert failed.value.node == "UNETLoader"


def test_a_layer_with_a_damaged_scale_is_named_by_the_stock_loader(server):
    """A damaged tensor of ours in a layer: the stock loader stops with its name, not with a matmul's error later."""
    graph = Graph()
    node = graph.quantize(graph.source("random_flux"), format="bnb_nf4")
    graph.add("QuantPressSave", quantized=(node, 0), folder="diffusion_models", name="to_damage", overwrite=True)
    server.run(graph)
    tensors = load_file(server.base / "models/diffusion_models/to_damage.safetensors")
    name = "single_blocks.0.linear2.weight_scale"
    save_file(
        {**tensors, name: tensors[name][:-1].contiguous()}, server.base / "models/diffusion_models/damaged.safetensors"
    )
    graph = Graph()
    unet = graph.unet("damaged.safetensors")
    graph.sample(unet, unet, "damaged")
    with pytest.raises(WorkflowError, match="single_blocks.0.linear2") as failed:
        server.run(graph)
    assert failed.value.node == "UNETLoader"


def test_a_checkpoint_with_prefixed_keys_goes_through_the_stock_checkpoint_loader(server):
    tensors = load_file(server.base / "models/diffusion_models/trained_sd3.safetensors")
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()},
        server.base / "models/checkpoints/prefixed.safetensors",
    )
    graph = Graph()
    source = graph.add("QuantPressLoadSource", file="checkpoints/prefixed.safetensors")
    quantized = graph.quantize(source, format="bnb_af4")
    graph.add("QuantPressSave", quantized=(quantized, 0), folder="checkpoints", name="prefixed-af4", overwrite=True)
    in_graph = graph.add("QuantPressLoadQuantized", quantized=(quantized, 0))
    graph.sample(in_graph, in_graph, "checkpoint/graph", steps=1)
    assert "architecture: SD3" in server.run(graph)[source]["text"][0]
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name="prefixed-af4.safetensors")
    graph.sample(loaded, loaded, "checkpoint/file", steps=1)
    server.run(graph)
    assert (server.latent("checkpoint/graph") == server.latent("checkpoint/file")).all()
    with safe_open(server.base / "models/checkpoints/prefixed-af4.safetensors", "pt") as file:
        names = file.keys()
    assert sum(name.endswith(".comfy_quant") for name in names) == 29


def test_a_spool_file_that_is_gone_is_named(server):
    (spool,) = quantize_file(server, "random_flux", format="mxfp8", seed=99)
    spool.unlink()
    graph = Graph()
    node = graph.quantize(graph.source("random_flux"), format="mxfp8", seed=99)
    graph.add("QuantPressSave", quantized=(node, 0), folder="output", name="gone", overwrite=True)
    with pytest.raises(WorkflowError, match="is gone from ComfyUI's temporary folder"):
        server.run(graph)


@pytest.mark.parametrize(
    "recipe",
    [{"rounding": "learned"}, {"rounding": "gptq"}, {"rounding": "stochastic", "seed": 3}, {"scales": "search"}],
    ids=str,
)
def test_every_method_works_inside_comfyuis_inference_mode(server, recipe):
    """Nodes run in torch.inference_mode, where nothing can be differentiated and tensors refuse in-place changes."""
    graph = Graph()
    node = graph.quantize(
        graph.source("random_flux"), format="bnb_nf4", only=r"double_blocks\.0\.img_attn\.proj", **recipe
    )
    graph.add("QuantPressInspect", file="(the connected model)", quantized=(node, 0))
    assert "1 x bnb_nf4" in server.run(graph)[node]["text"][0]
