"""The tools' nodes in a running ComfyUI: what each writes and what it refuses, previews, caching and Cancel."""

import hashlib
import json
import time

import pytest
import torch
from comfy_server import Graph, WorkflowError
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.numerics.packing import unswizzle_scales
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HEADER = "_quantization_metadata"
LAYERS = ("x_block.attn.qkv", "x_block.attn.proj", "x_block.mlp.fc1", "x_block.mlp.fc2")


class Tools(Graph):
    """A graph with the tools' widgets at their defaults."""

    def open(self, file):
        return self.add("QuantPressOpenFile", file=f"diffusion_models/{file}.safetensors")

    def repair(self, node, **values):
        defaults = {
            "only_diagnose": False,
            "assume": "automatic",
            "unswizzled": False,
            "mode": "repair",
            "marker": "0",
            "add_scale_input": False,
            "keep_shapes": False,
        }
        return self.add("QuantPressRepair", quantized=(node, 0), **{**defaults, **values})

    def migrate(self, node, **values):
        defaults = {
            "target": "comfy_quant",
            "full_precision": "as it is",
            "input_scale": "keep",
            "hp_filter": "",
            "header": True,
            "preview": False,
        }
        return self.add("QuantPressMigrate", quantized=(node, 0), **{**defaults, **values})

    def edit(self, node, **values):
        defaults = {"add": "", "remove": "", "layers": "", "header": "update", "force": False, "preview": False}
        return self.add("QuantPressEditMetadata", quantized=(node, 0), **{**defaults, **values})

    def scales(self, node, method, **values):
        defaults = {
            "samples": 64,
            "percentile": 99.9,
            "seed": 42,
            "captured_percentile": 100.0,
            "lora": "none",
            "file": "none",
            "preview": False,
        }
        return self.add("QuantPressInputScales", quantized=(node, 0), method=method, **{**defaults, **values})

    def save(self, node, name):
        return self.add("QuantPressSave", quantized=(node, 0), folder="diffusion_models", name=name, overwrite=True)


def path_of(server, name):
    return server.base / f"models/diffusion_models/{name}.safetensors"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def spools(server):
    folder = server.base / "temp/quantpress"
    return {path: path.stat().st_ino for path in folder.glob("*.safetensors")} if folder.is_dir() else {}


def in_fp8(server):
    """{layer: (codes, scale)} of the trained model's blocks, and everything else."""
    tensors = load_file(path_of(server, "trained_sd3"))
    coded = {}
    for block in range(4):
        for layer in (f"joint_blocks.{block}.{name}" for name in LAYERS):
            w = tensors.pop(f"{layer}.weight").float()
            scale = w.abs().max() / 448
            coded[layer] = ((w / scale).to(torch.float8_e4m3fn), scale)
    return coded, tensors


def text_bytes(config):
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def files(server):
    """One model in FP8, four times: sound, legacy, broken, and as input scales in JSON."""
    coded, rest = in_fp8(server)
    legacy = {**rest, "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    sound, broken = dict(rest), dict(rest)
    for layer, (codes, scale) in coded.items():
        config = text_bytes({"format": "float8_e4m3fn"})
        legacy |= {f"{layer}.weight": codes, f"{layer}.scale_weight": scale.reshape(1)}
        sound |= {f"{layer}.weight": codes, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": config}
        broken |= {
            f"{layer}.weight": codes,
            f"{layer}.weight_scale": scale,
            f"{layer}.comfy_quant": torch.cat([config, torch.zeros(3, dtype=torch.uint8)]),
        }
    header = {layer: {"format": "float8_e4m3fn"} for layer in coded}
    broken["joint_blocks.0.x_block.lost.weight_scale"] = torch.tensor(1.0)
    save_file(legacy, path_of(server, "legacy"))
    save_file(
        sound,
        path_of(server, "sound"),
        {HEADER: json.dumps({"format_version": "1.0", "layers": header}), "keep": "me"},
    )
    save_file(broken, path_of(server, "broken"), {HEADER: "{"})
    (server.base / "models/calibrations").mkdir(exist_ok=True)
    (server.base / "models/calibrations/scales.json").write_text(
        json.dumps({f"model.diffusion_model.{layer}": 0.001 for layer in coded})
    )
    return tuple(coded)


def test_a_legacy_file_is_opened_migrated_edited_saved_loaded_and_samples_as_before(server, files):
    before, graph = digest(path_of(server, "legacy")), Tools()
    opened = graph.open("legacy")
    migrated = graph.migrate(opened, hp_filter="final_layer")
    edited = graph.edit(migrated, add="'note': \"from a friend\", 'revision': 2", layers=r"joint_blocks\.0\.")
    saved = graph.save(edited, "tools/{model}-{format}-{rounding}")
    original = graph.unet("legacy.safetensors")
    for name, model in (
        ("legacy", original),
        ("file", graph.unet((saved, 0))),
        ("graph", graph.add("QuantPressLoadQuantized", quantized=(edited, 0))),
    ):
        graph.sample(model, original, f"tools/{name}")
    outputs = server.run(graph)
    assert "16 x float8_e4m3fn, legacy form" in outputs[opened]["text"][0] and "Migrate" in outputs[opened]["text"][0]
    assert "legacy float8_e4m3fn -> comfy_quant" in outputs[migrated]["text"][0]
    assert "4 rewritten" in outputs[edited]["text"][0]
    assert "tools/legacy-float8_e4m3fn-unknown.safetensors" in outputs[saved]["text"][0]
    assert torch.equal(server.latent("tools/file"), server.latent("tools/legacy"))
    assert torch.equal(server.latent("tools/graph"), server.latent("tools/legacy"))
    assert digest(path_of(server, "legacy")) == before
    with safe_open(path_of(server, "tools/legacy-float8_e4m3fn-unknown"), "pt") as file:
        header = json.loads(file.metadata()[HEADER])["layers"]
        configs = {layer: json.loads(bytes(file.get_tensor(f"{layer}.comfy_quant").tolist())) for layer in files}
    assert (
        configs == header
        and configs["joint_blocks.0.x_block.mlp.fc1"]
        == {"format": "float8_e4m3fn", "note": "from a friend", "revision": 2}
        and "note" not in configs["joint_blocks.1.x_block.mlp.fc1"]
    )


def test_a_broken_file_is_diagnosed_repaired_and_loads(server, files):
    before, graph = digest(path_of(server, "broken")), Tools()
    opened = graph.open("broken")
    diagnosed = graph.repair(opened, only_diagnose=True)
    found = graph.add("PreviewAny", source=(graph.repair(opened), 2))
    graph.save(diagnosed, "tools/never")
    repaired = graph.repair(opened)
    outputs = server.run(graph)
    assert "3 kinds of problems. Repair lists all" in outputs[opened]["text"][0]
    for text in (outputs[diagnosed]["text"][0], outputs[repaired]["text"][0]):
        assert "error config-nul (16 x): " in text and "error header-json: " in text
        assert (
            "error orphan, NOT repaired: joint_blocks.0.x_block.lost" in text and "1 without an exact answer" in text
        )
    assert "19 problems: 18 can be repaired" in outputs[diagnosed]["text"][0]
    assert "19 problems: 18 repaired" in outputs[repaired]["text"][0]
    assert "would change" in outputs[diagnosed]["text"][0] and "written and checked" in outputs[repaired]["text"][0]
    assert not path_of(server, "tools/never").exists()  # only_diagnose: the nodes behind wait
    findings = json.loads(outputs[found]["text"][0])
    assert {row["code"] for row in findings} >= {"config-nul", "header-json", "orphan"} and {
        row["fixed"] for row in findings
    } == {True, False}
    assert digest(path_of(server, "broken")) == before


def test_the_repaired_file_samples_as_the_sound_one(server, files):
    graph = Tools()
    saved = graph.save(graph.repair(graph.open("broken")), "tools/repaired")
    sound = graph.unet("sound.safetensors")
    graph.sample(sound, sound, "tools/sound")
    graph.sample(graph.unet((saved, 0)), sound, "tools/repaired")
    text = server.run(graph)[saved]["text"][0]
    assert (
        "warning: joint_blocks.0.x_block.lost.weight_scale" in text
    )  # a user's file: what stays is told, not refused
    assert torch.equal(server.latent("tools/repaired"), server.latent("tools/sound"))


def test_connecting_the_original_finds_block_scales_in_row_order(server, files):
    """NVFP4 as other tools write it: everything fits, everything loads, and the picture is noise."""
    nvfp4, rest = get_format("nvfp4"), load_file(path_of(server, "trained_sd3"))
    right = {}
    for layer in files:
        w = rest.pop(f"{layer}.weight")
        right |= {f"{layer}.{suffix}": tensor for suffix, tensor in nvfp4.quantize(w).items()}
        right[f"{layer}.comfy_quant"] = text_bytes(nvfp4.config(tuple(w.shape), w.dtype))
    wrong = {
        name: unswizzle_scales(tensor, tensor.shape[0], tensor.shape[1]) if name.endswith(".weight_scale") else tensor
        for name, tensor in right.items()
    }
    save_file({**rest, **right}, path_of(server, "nvfp4"))
    save_file({**rest, **wrong}, path_of(server, "row_order"))
    graph = Tools()
    alone = graph.repair(graph.open("row_order"), only_diagnose=True)
    repaired = graph.repair(graph.open("row_order"), original=(graph.source("trained_sd3"), 0))
    graph.save(repaired, "tools/swizzled")
    outputs = server.run(graph)
    assert "unswizzled" not in outputs[alone]["text"][0]
    assert (
        "off with unswizzled" in outputs[repaired]["text"][0]
        and "error scale-unswizzled (16 x)" in outputs[repaired]["text"][0]
    )
    one, other = load_file(path_of(server, "nvfp4")), load_file(path_of(server, "tools/swizzled"))
    assert all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
        if name.endswith(".weight_scale")
    )
    graph.nodes[repaired]["inputs"]["unswizzled"] = True
    with pytest.raises(WorkflowError, match="disconnect it"):
        server.run(graph)


def test_a_plain_file_and_a_legacy_one_say_which_node_takes_them(server, files):
    graph = Tools()
    plain, legacy = graph.open("trained_sd3"), graph.repair(graph.open("legacy"), only_diagnose=True)
    inspected = graph.add("QuantPressInspect", file="(the connected model)", quantized=(plain, 0))
    outputs = server.run(graph)
    assert "Load Model to Quantize takes such files" in outputs[plain]["text"][0]
    assert "trained_sd3.safetensors: SD3" in outputs[inspected]["text"][0]
    rows = [line for line in outputs[inspected]["text"][0].splitlines() if line.startswith(" ")]
    assert any("joint_blo~.N.context_b~.adaLN_modu~.N" in row for row in rows)
    assert max(map(len, rows)) <= 60 and "biases, norms and numbers" in rows[-1]  # as wide as the node
    assert "warning legacy, NOT repaired: 16 layers" in outputs[legacy]["text"][0]


def test_a_sound_file_goes_through_the_tools_unchanged_and_nothing_is_written(server, files):
    before, graph = spools(server), Tools()
    repaired = graph.repair(graph.open("sound"))
    migrated = graph.migrate(repaired)
    graph.save(migrated, "tools/sound-copy")
    outputs = server.run(graph)
    assert "no problems found" in outputs[repaired]["text"][0] and "nothing to change" in outputs[migrated]["text"][0]
    assert (
        "16 quantized layers are in ComfyUI's own form (float8_e4m3fn). There is nothing to migrate"
        in outputs[migrated]["text"][0]
    )
    assert set(spools(server)) <= set(before)
    copy = path_of(server, "tools/sound-copy")
    assert (
        digest(copy) == digest(path_of(server, "sound")) and copy.stat().st_nlink == 1
    )  # no second name of the user's file


@pytest.mark.parametrize(
    "values, said",
    [
        ({"remove": "format"}, "without `format` no loader knows how to read the layer"),
        ({"add": '{"format": "int8_blockwise", "group_size": 48}'}, "The file would not load"),
        ({"add": "'open("}, "neither JSON nor a list"),
        ({"add": "'a': 1", "layers": "no_such"}, "finds none of the 16 quantized layers"),
        ({"add": "'a': 1", "layers": "("}, "is not a regular expression"),
        ({}, "There is nothing to do"),
    ],
)
def test_a_wrong_edit_is_refused_at_the_node(server, files, values, said):
    before, graph = spools(server), Tools()
    graph.save(graph.edit(graph.open("sound"), **values), "tools/wrong")
    with pytest.raises(WorkflowError) as failed:
        server.run(graph)
    assert failed.value.node == "QuantPressEditMetadata" and failed.value.kind in ("RequestError", "PlanError")
    assert said in failed.value.message and not path_of(server, "tools/wrong").exists()
    assert set(spools(server)) <= set(before)


def test_force_writes_a_wrong_edit_and_saving_warns(server, files):
    graph = Tools()
    saved = graph.save(
        graph.edit(graph.open("sound"), remove="format", layers=r"joint_blocks\.0\..*fc1", force=True), "tools/forced"
    )
    assert "warning: " in server.run(graph)[saved]["text"][0]
    with safe_open(path_of(server, "tools/forced"), "pt") as file:
        assert bytes(file.get_tensor("joint_blocks.0.x_block.mlp.fc1.comfy_quant").tolist()) == b"{}"


def test_a_preview_writes_nothing_and_the_nodes_behind_it_wait(server, files):
    before, graph = spools(server), Tools()
    opened = graph.open("legacy")
    previews = [
        graph.migrate(opened, preview=True),
        graph.scales(graph.open("sound"), "simulated", preview=True),
        graph.edit(graph.open("sound"), header="remove", preview=True),
    ]
    for number, node in enumerate(previews):
        graph.save(node, f"tools/preview{number}")
    outputs = server.run(graph)
    assert all("would change: " in outputs[node]["text"][0] for node in previews)
    assert set(spools(server)) <= set(before)
    assert not list(path_of(server, "tools/x").parent.glob("preview*"))


def test_an_edit_of_a_quantized_model_is_cached_and_keeps_the_recipe_for_the_name(server):
    graph = Tools()
    quantized = graph.quantize(graph.source("random_flux"), format="int8_rowwise", seed=31)
    edited = graph.edit(quantized, add="'revision': 1")
    saved = graph.save(edited, "tools/{model}-{format}-{seed}-{bits}")
    loaded = graph.add("QuantPressLoadQuantized", quantized=(edited, 0))
    graph.sample(loaded, loaded, "tools/edited", steps=1)
    assert "tools/random_flux-int8_rowwise-31-8" in server.run(graph)[saved]["text"][0]
    first, graph = spools(server), Tools()  # other node ids: ComfyUI's cache does not help
    graph.sample(graph.unet("random_flux.safetensors"), graph.unet("random_flux.safetensors"), "tools/none", steps=1)
    quantized = graph.quantize(graph.source("random_flux"), format="int8_rowwise", seed=31)
    graph.save(graph.edit(quantized, add="'revision': 1"), "tools/again")
    server.run(graph)
    assert spools(server) == first
    assert digest(path_of(server, "tools/again")) in {digest(path) for path in first}


def test_legacy_and_back_is_the_same_file(server, files):
    graph = Tools()
    migrated = graph.migrate(graph.open("legacy"))
    graph.save(graph.migrate(migrated, target="legacy fp8_scaled"), "tools/back")
    tidy = graph.repair(graph.open("legacy"), mode="tidy legacy", marker="2", add_scale_input=True)
    graph.save(tidy, "tools/tidy")
    server.run(graph)
    one, back, tidied = (load_file(path_of(server, name)) for name in ("legacy", "tools/back", "tools/tidy"))
    assert set(back) == set(one) and all(
        torch.equal(back[name].float().flatten(), one[name].float().flatten()) for name in one
    )
    assert tidied["scaled_fp8"].numel() == 2 and tidied["joint_blocks.0.x_block.mlp.fc1.scale_input"].item() == 1.0
    assert tidied["joint_blocks.0.x_block.mlp.fc1.scale_weight"].shape == ()


@pytest.mark.parametrize(
    "values, said",
    [
        ({"hp_filter": "mlp.fc1"}, "must be in high precision"),
        ({"target": "legacy fp8_scaled", "full_precision": "set"}, "put Edit Metadata before this node"),
        ({"target": "legacy fp8_scaled", "input_scale": "weight scale"}, "Choose keep or 1.0"),
    ],
)
def test_a_migration_that_cannot_be_says_what_to_do(server, files, values, said):
    graph = Tools()
    graph.save(graph.migrate(graph.open("sound"), **values), "tools/wrong")
    with pytest.raises(WorkflowError) as failed:
        server.run(graph)
    assert failed.value.node == "QuantPressMigrate" and said in failed.value.message


def input_scales(path):
    return {
        name.removesuffix(".input_scale"): tensor.item()
        for name, tensor in load_file(path).items()
        if name.endswith(".input_scale")
    }


def test_input_scales_from_every_source_leave_the_weights_alone(server, files):
    state = {
        "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_up.weight": torch.randn(768, 2),
        "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_down.weight": torch.randn(2, 256),
    }
    save_file(state, server.base / "models/loras/directions.safetensors")
    graph, shown = Tools(), {}
    ways = {
        "simulated": {},
        "LoRA": {"lora": "loras/directions.safetensors"},
        "file": {"file": "calibrations/scales.json"},
        "weight scales": {},
    }
    for method, values in ways.items():
        shown[method] = graph.scales(graph.open("sound"), method, **values)
        graph.save(shown[method], f"tools/scales-{method}")
    outputs = server.run(graph)
    sound, written = load_file(path_of(server, "sound")), {}
    for method in ways:
        tensors = load_file(path_of(server, f"tools/scales-{method}"))
        assert all(
            torch.equal(
                sound[name].view(torch.uint8) if sound[name].ndim else sound[name],
                tensors[name].view(torch.uint8) if sound[name].ndim else tensors[name],
            )
            for name in sound
        )
        written[method] = input_scales(path_of(server, f"tools/scales-{method}"))
        assert set(written[method]) == set(files) and "16 added" in outputs[shown[method]]["text"][0]
    assert list(written["file"].values()) == pytest.approx([0.001] * 16)
    assert written["weight scales"] == {layer: sound[f"{layer}.weight_scale"].item() for layer in files}
    differ = {layer for layer in files if written["LoRA"][layer] != written["simulated"][layer]}
    assert (
        differ == {"joint_blocks.0.x_block.attn.qkv"}
        and "LoRA directions.safetensors for 1 layer, " in outputs[shown["LoRA"]]["text"][0]
    )
    graph = Tools()  # another quantized model as the file
    graph.save(
        graph.scales(graph.open("sound"), "file", file="diffusion_models/tools/scales-simulated.safetensors"),
        "tools/scales-copied",
    )
    server.run(graph)
    assert input_scales(path_of(server, "tools/scales-copied")) == written["simulated"]


def test_input_scales_from_a_calibration_are_the_true_absmax_and_lower_ones_are_warned_of(server, files):
    graph = Tools()
    unet = graph.unet("trained_sd3.safetensors")
    capture = graph.add(
        "QuantPressCapture",
        model=(unet, 0),
        runs="accumulate",
        hessians=False,
        device_gb=4.0,
        ram_gb=4.0,
        rows_per_step=32,
        layers="",
        seed=7,
    )
    positive, negative = (
        graph.add("QuantPressTestConditioning", model=(unet, 0), kind="demo shapes", seed=n) for n in (1, 2)
    )
    latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    drawn = graph.add(
        "KSampler",
        model=(capture, 0),
        positive=(positive, 0),
        negative=(negative, 0),
        latent_image=(latent, 0),
        seed=1,
        steps=2,
        cfg=3.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    collected = graph.add("QuantPressCollect", latent=(drawn, 0), capture=(capture, 1))
    graph.add("QuantPressSaveCalibration", calibration=(collected, 0), name="tools", overwrite=True)
    true = graph.scales(graph.open("sound"), "calibration", calibration=(collected, 0))
    graph.save(true, "tools/scales-captured")
    tight = graph.scales(graph.open("sound"), "file", file="calibrations/scales.json", calibration=(collected, 0))
    low = graph.scales(graph.open("sound"), "calibration", captured_percentile=50.0, calibration=(collected, 0))
    outputs = server.run(graph)
    captured, scales = (
        load_file(server.base / "models/calibrations/tools.safetensors"),
        input_scales(path_of(server, "tools/scales-captured")),
    )
    assert scales == {layer: pytest.approx(captured[f"{layer}.absmax"].max().item() / 448) for layer in files}
    assert "warning" not in outputs[true]["text"][0]
    for node in (tight, low):
        assert (
            "warning: joint_blocks" in outputs[node]["text"][0] and "saturates them above" in outputs[node]["text"][0]
        )
        assert "8 more layers saturate" in outputs[node]["text"][0]


@pytest.mark.parametrize(
    "method, said",
    [
        ("LoRA", "choose one from models/loras"),
        ("file", "needs a file in `file`"),
        ("calibration", "connect Collect Calibration or Load Calibration"),
    ],
)
def test_a_method_without_its_own_input_says_what_it_needs(server, files, method, said):
    graph = Tools()
    graph.save(graph.scales(graph.open("sound"), method), "tools/wrong")
    with pytest.raises(WorkflowError) as failed:
        server.run(graph)
    assert (
        failed.value.node == "QuantPressInputScales"
        and failed.value.kind == "RequestError"
        and said in failed.value.message
    )


def test_shards_are_joined_when_they_are_opened(server, files):
    tensors = load_file(path_of(server, "sound"))
    folder = server.base / "models/diffusion_models/parts"
    folder.mkdir()
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    graph = Tools()
    opened = graph.add("QuantPressOpenFile", file="diffusion_models/parts/model.safetensors.index.json")
    graph.save(opened, "tools/joined")
    assert "16 x float8_e4m3fn" in server.run(graph)[opened]["text"][0]
    joined = load_file(path_of(server, "tools/joined"))
    assert set(joined) == set(tensors)
    assert all(torch.equal(joined[name].float(), tensor.float()) for name, tensor in tensors.items())


def write_large(path, layers=24, width=4096):
    """A sparse file of FP8 zeros with scales of 1: large to read and write, nothing to make."""
    entries, size = {}, 0
    for index in range(layers):
        for suffix, dtype, shape, nbytes in (
            ("weight", "F8_E4M3", [width, width], width * width),
            ("weight_scale", "F32", [], 4),
        ):
            entries[f"blocks.{index}.lin.{suffix}"] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [size, size + nbytes],
            }
            size += nbytes
    configs = {f"blocks.{index}.lin": {"format": "float8_e4m3fn"} for index in range(layers)}
    header = json.dumps(
        {"__metadata__": {HEADER: json.dumps({"format_version": "1.0", "layers": configs})}, **entries}
    ).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


@pytest.mark.parametrize("tool", ["edit", "repair", "migrate", "scales"])
def test_cancel_stops_within_seconds_and_leaves_nothing(server, tool):
    path = path_of(server, "huge")
    if not path.exists():
        write_large(path)
    folder = server.base / "temp/quantpress"
    folder.mkdir(parents=True, exist_ok=True)
    graph = Tools()
    opened = graph.open("huge")
    node = {
        "edit": lambda: graph.edit(opened, add="'a': 1"),
        "repair": lambda: graph.repair(opened),
        "migrate": lambda: graph.migrate(opened),
        "scales": lambda: graph.scales(opened, "simulated"),
    }[tool]()
    graph.save(node, "tools/huge")
    prompt = server.submit(graph)
    end = time.monotonic() + 60
    if tool == "scales":
        while not server.call("/queue")["queue_running"]:
            assert time.monotonic() < end, "it never began"
        time.sleep(1.0)
    else:
        while not list(folder.glob(".huge*.part")):  # it writes: the run is in the middle
            assert time.monotonic() < end, "it never wrote"
            time.sleep(0.02)
    started = time.monotonic()
    server.call("/interrupt", {})
    with pytest.raises(WorkflowError) as stopped:
        server.wait(prompt)
    assert stopped.value.kind == "interrupted" and time.monotonic() - started < 4
    assert not [path for path in (*folder.glob("*"), *folder.glob(".*")) if "huge" in path.name]
