"""From file to file: what is planned is written, what is not quantized is untouched, nothing half-written stays."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from comfy_kitchen.backends.eager.w4a8_int8 import quantize_w4a8_int8_weight
from comfyui_quantpress.quant_core.checkpoint.metadata import HEADER_KEY, build_header_metadata, encode_config
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import Cancelled, InputFileError, OutputError, PlanError, RequestError
from comfyui_quantpress.quant_core.formats import all_formats, get_format
from comfyui_quantpress.quant_core.pipeline.compare import verify_file
from comfyui_quantpress.quant_core.pipeline.feed import count_nonfinite
from comfyui_quantpress.quant_core.pipeline.plan import RECIPE_KEY, make_plan
from comfyui_quantpress.quant_core.pipeline.request import Request, pick_device
from comfyui_quantpress.quant_core.pipeline.run import convert
from comfyui_quantpress.quant_core.pipeline.verify import check_file
from comfyui_quantpress.quant_core.policy.general import Policy, name_rule
from comfyui_quantpress.quant_core.policy.recipe import Recipe, parse_recipe
from comfyui_quantpress.quant_core.tools.repair import repair
from safetensors import safe_open
from safetensors.torch import load_file, save_file

every_format = pytest.mark.parametrize("fmt", all_formats(), ids=lambda f: f.name)


def tiny_model(seed=0, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: (torch.randn(shape, generator=g) * 0.02).to(dtype)  # noqa: E731
    model = {}
    for i in range(2):
        model |= {
            f"blocks.{i}.attn.qkv.weight": rand(768, 256),
            f"blocks.{i}.attn.qkv.bias": rand(768),
            f"blocks.{i}.mlp.fc2.weight": rand(256, 512),
            f"blocks.{i}.norm1.weight": rand(256),
            f"blocks.{i}.adaLN_modulation.1.weight": rand(512, 256),
        }
    model |= {
        "img_in.weight": rand(256, 64),
        "final_layer.linear.weight": rand(64, 256),
        "x_embedder.proj.weight": rand(256, 16, 2, 2),
        "pos_embed": torch.randn(1, 8, 256, generator=g),
        "step": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
    }
    return model


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tiny_model(), path, {"author": "somebody", "note": "ä"})
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@every_format
def test_plan_run_and_verify_agree(fmt, source, tmp_path):
    target = tmp_path / "out.safetensors"
    before = digest(source)
    with open_source(source) as src:
        plan = make_plan(src, Request(src.path, Path("planned"), Recipe(fmt)))
    report = convert(Request(source, target, Recipe(fmt)))
    assert digest(source) == before
    with open_source(target) as out:
        assert {(t.name, t.dtype, t.shape) for t in out.tensors.values()} == {
            (o.name, o.dtype, o.shape) for o in plan.outputs
        }
        assert out.nbytes == plan.output_bytes == report.output_bytes
    assert [r.layer for r in report.quantized] == [layer.layer for layer in plan.quantized]
    assert {r.layer for r in report.quantized} == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "mlp.fc2")}
    verified = verify_file(target, against=source)
    assert not verified.findings
    for row, check in zip(report.quantized, verified.layers, strict=True):
        assert row.layer == check.layer and check.relative_error == pytest.approx(row.weight_error, rel=2e-2)
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".part"]


@every_format
def test_same_input_recipe_and_seed_give_the_same_bytes(fmt, source, tmp_path):
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    convert(Request(source, one, Recipe(fmt, seed=3)))
    convert(Request(source, two, Recipe(fmt, seed=3)))
    assert digest(one) == digest(two)


def test_untouched_tensors_and_metadata_are_kept(source, tmp_path):
    target = tmp_path / "out.safetensors"
    convert(Request(source, target, Recipe(get_format("nvfp4"))))
    before, after = load_file(source), load_file(target)
    for name, tensor in before.items():
        if name in (
            "blocks.0.attn.qkv.weight",
            "blocks.1.attn.qkv.weight",
            "blocks.0.mlp.fc2.weight",
            "blocks.1.mlp.fc2.weight",
        ):
            continue
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert (metadata["author"], metadata["note"]) == ("somebody", "ä")
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    for layer, config in layers.items():
        assert json.loads(bytes(after[f"{layer}.comfy_quant"].tolist())) == config
    record = json.loads(metadata[RECIPE_KEY])
    with open_source(source) as src:
        assert record["source_hash"] == src.identity_hash()
    assert record["source"] == "model.safetensors" and record["recipe"]["format"] == "nvfp4" and record["version"]


def test_every_safetensors_dtype_is_copied_untouched(tmp_path):
    model = tiny_model() | {
        f"extra.{str(d)[6:]}": torch.arange(6).to(d)
        for d in (
            torch.uint8,
            torch.int8,
            torch.int16,
            torch.uint16,
            torch.int32,
            torch.uint32,
            torch.int64,
            torch.uint64,
            torch.float16,
            torch.float32,
            torch.float64,
            torch.bool,
            torch.complex64,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        )
    }
    path, target = tmp_path / "m.safetensors", tmp_path / "o.safetensors"
    save_file(model, path)
    convert(Request(path, target, Recipe(get_format("int8_rowwise"))))
    with open_source(path) as a, open_source(target) as b:
        extras = [name for name in a.tensors if name.startswith("extra.")]
        assert len(extras) == 15
        for name in extras:
            assert a.tensors[name].dtype == b.tensors[name].dtype and torch.equal(
                a.read_bytes(name), b.read_bytes(name)
            )


def test_a_sharded_source_gives_the_same_layers(source, tmp_path):
    model = tiny_model()
    names = sorted(model)
    folder = tmp_path / "shards"
    folder.mkdir()
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: model[n] for n in part}, folder / f"m-{i}.safetensors")
    index = {"weight_map": {n: f"m-{i % 2}.safetensors" for i, n in enumerate(names)}}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    whole, sharded = tmp_path / "whole.safetensors", tmp_path / "sharded.safetensors"
    convert(Request(source, whole, Recipe(get_format("bnb_nf4"))))
    convert(Request(folder, sharded, Recipe(get_format("bnb_nf4"))))
    a, b = load_file(whole), load_file(sharded)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8)) for n in a)


@pytest.mark.parametrize("first", [f.name for f in all_formats()])
def test_a_quantized_source_is_decoded_with_its_own_scales_first(first, source, tmp_path):
    middle, target = tmp_path / "q1.safetensors", tmp_path / "q2.safetensors"
    convert(Request(source, middle, Recipe(get_format(first))))
    report = convert(Request(middle, target, Recipe(get_format("int8_rowwise"))))
    assert any("decoded with its own scales" in str(w) for w in report.warnings)
    assert all(row.source == first for row in report.quantized)
    against_middle = verify_file(target, against=middle)
    assert not against_middle.errors and max(c.relative_error for c in against_middle.layers) < 0.012
    with safe_open(target, "pt") as file:
        keys = set(file.keys())
    assert not {k for k in keys if k.endswith(("weight_scale_2", "weight_codebook", "weight_zeros", "input_scale"))}


def test_a_kept_quantized_layer_is_copied_as_it_is(source, tmp_path):
    middle, target = tmp_path / "q1.safetensors", tmp_path / "q2.safetensors"
    convert(Request(source, middle, Recipe(get_format("nvfp4"))))
    convert(Request(middle, target, Recipe(get_format("int8_rowwise")), Policy(keep=("attn",))))
    before, after = load_file(middle), load_file(target)
    for suffix in ("weight", "weight_scale", "weight_scale_2", "comfy_quant"):
        name = f"blocks.0.attn.qkv.{suffix}"
        assert torch.equal(before[name].reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8))
    assert not verify_file(target, against=middle).errors
    assert {c.format for c in check_file(target).layers} == {"nvfp4", "int8_rowwise"}


def test_policy_options(source, tmp_path):
    with open_source(source) as src:
        recipe = Recipe(get_format("int8_rowwise"))

        def chosen(policy):
            plan = make_plan(src, Request(src.path, Path("planned"), recipe, policy))
            return {layer.layer for layer in plan.quantized}

        assert chosen(Policy(only=(r"blocks\.0\.",))) == {
            "blocks.0.attn.qkv",
            "blocks.0.mlp.fc2",
            "blocks.0.adaLN_modulation.1",
        }
        assert chosen(Policy(keep=("fc2",))) == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}
        assert chosen(Policy(only=("blocks",), keep=("adaLN", "attn"))) == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
        plan = make_plan(src, Request(src.path, Path("planned"), recipe))
        reasons = {layer.layer: layer.reason for layer in plan.kept}
        assert reasons == {
            "blocks.0.adaLN_modulation.1": "modulation",
            "blocks.1.adaLN_modulation.1": "modulation",
            "img_in": "input layer",
            "final_layer.linear": "output layer",
        }


@pytest.mark.parametrize(
    "policy, words",
    [
        (Policy(keep=("(",)), "is not a regular expression"),
        (Policy(only=("nosuch",)), "matches none of the"),
        (Policy(keep=("blocks",)), "none of the 8 linear layers would be quantized"),
    ],
)
def test_policies_that_cannot_be_meant_are_refused(policy, words, source):
    with open_source(source) as src, pytest.raises(PlanError, match=words):
        make_plan(src, Request(src.path, Path("planned"), Recipe(get_format("int8_rowwise")), policy))


def test_fallback_takes_what_the_main_format_cannot(source):
    with open_source(source) as src:
        recipe = Recipe(get_format("bnb_nf4"))
        plan = make_plan(
            src,
            Request(
                src.path,
                Path("planned"),
                recipe,
                Policy(fallback=Recipe(get_format("int8_rowwise"))),
                never_pack=frozenset({"blocks.0.attn.qkv"}),
            ),
        )
        formats = {layer.layer: layer.recipe.format.name for layer in plan.quantized}
        assert formats["blocks.0.attn.qkv"] == "int8_rowwise" and formats["blocks.1.attn.qkv"] == "bnb_nf4"
        kept = make_plan(src, Request(src.path, Path("planned"), recipe, never_pack=frozenset({"blocks.0.attn.qkv"})))
        assert next(x for x in kept.layers if x.layer == "blocks.0.attn.qkv").reason.startswith(
            "ComfyUI's model detection"
        )


def test_block_formats_keep_what_does_not_divide(tmp_path):
    path, target = tmp_path / "m.safetensors", tmp_path / "o.safetensors"
    save_file({"blocks.0.a.weight": torch.randn(128, 128), "blocks.0.b.weight": torch.randn(100, 128)}, path)
    report = convert(Request(path, target, Recipe(get_format("int8_blockwise"))))
    assert [r.layer for r in report.quantized] == ["blocks.0.a"]
    assert "out_features=100 is not a multiple of group_size 128" in report.layers[0].reason + report.layers[1].reason


# ---- what can go wrong ----------------------------------------------------------------------------------------------
def test_nonfinite_weights_are_refused_by_name_and_count_or_kept(source, tmp_path):
    model, target = tiny_model(), tmp_path / "o.safetensors"
    model["blocks.1.mlp.fc2.weight"][3, :5] = float("nan")
    model["blocks.1.mlp.fc2.weight"][4, 0] = float("inf")
    path = tmp_path / "bad.safetensors"
    save_file(model, path)
    with pytest.raises(InputFileError, match=r"blocks.1.mlp.fc2.weight: 6 of 131072 values are NaN or Inf"):
        convert(Request(path, target, Recipe(get_format("float8_e4m3fn"))))
    assert not target.exists()
    report = convert(Request(path, target, Recipe(get_format("float8_e4m3fn")), allow_nonfinite=True))
    kept = next(r for r in report.layers if r.layer == "blocks.1.mlp.fc2")
    assert kept.format is None and "6 values are NaN or Inf" in kept.reason
    assert any("blocks.1.mlp.fc2" in str(w) for w in report.warnings)
    assert load_file(target)["blocks.1.mlp.fc2.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_nonfinite_counts(dtype):
    w = torch.ones(8, 8).to(dtype)
    assert count_nonfinite(w) == 0
    w[0, 0] = float("inf")
    w[1, :3] = float("nan")
    assert count_nonfinite(w) == 4


def test_cancel_leaves_nothing_and_is_fast(source, tmp_path):
    model = {f"blocks.{i}.w.weight": torch.randn(2048, 2048).bfloat16() for i in range(3)}
    path, target = tmp_path / "big.safetensors", tmp_path / "o.safetensors"
    save_file(model, path)
    pressed = threading.Event()
    when = []

    def press():
        when.append(time.monotonic())
        pressed.set()

    timer = threading.Timer(0.3, press)
    timer.start()
    with pytest.raises(Cancelled):
        convert(Request(path, target, Recipe(get_format("asym_w4a8_int8"))), cancel=pressed.is_set)
    assert time.monotonic() - when[0] < 1.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.safetensors", "model.safetensors"]


def test_an_error_in_the_callback_leaves_nothing(source, tmp_path):
    def progress(state):
        if state.done_layers == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(Request(source, tmp_path / "o.safetensors", Recipe(get_format("nvfp4"))), progress=progress)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_progress_reaches_its_total_and_never_falls(source, tmp_path):
    states = []
    convert(Request(source, tmp_path / "o.safetensors", Recipe(get_format("nvfp4"))), progress=states.append)
    done = [s.done_bytes for s in states]
    assert done == sorted(done) and done[-1] == states[-1].total_bytes == open_source(source).nbytes
    assert states[-1].done_layers == states[-1].total_layers == 4 and states[-1].eta_s == 0


def test_targets_that_must_not_be_written(source, tmp_path):
    recipe = Recipe(get_format("nvfp4"))
    with pytest.raises(OutputError, match="model.safetensors"):
        convert(Request(source, source, recipe, overwrite=True))
    target = tmp_path / "o.safetensors"
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        convert(Request(source, target, recipe))
    assert target.read_text() == "mine"
    with pytest.raises(OutputError):
        convert(Request(source, tmp_path / "no" / "o.safetensors", recipe))
    convert(Request(source, target, recipe, overwrite=True))
    assert check_file(target).layers


def test_unknown_devices_and_methods_are_refused(source, tmp_path):
    with pytest.raises(RequestError, match="device nosuch"):
        convert(Request(source, tmp_path / "o.safetensors", Recipe(get_format("nvfp4")), device="nosuch"))
    with pytest.raises(RequestError, match="rounding"):
        convert(Request(source, tmp_path / "o.safetensors", parse_recipe(get_format("nvfp4"), rounding="nosuch")))
    assert not (tmp_path / "o.safetensors").exists()


# ---- verify ---------------------------------------------------------------------------------------------------------
def broken(source, tmp_path, change, fmt="nvfp4"):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    convert(Request(source, good, Recipe(get_format(fmt))))
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(good)
    change(tensors, metadata)
    save_file(tensors, bad, metadata)
    return bad


LAYER = "blocks.0.attn.qkv"
DEFECTS = {
    "tensor-missing": lambda t, m: t.pop(f"{LAYER}.weight_scale_2"),
    "weight-missing": lambda t, m: t.pop(f"{LAYER}.weight"),
    "orphan": lambda t, m: t.update({"img_in.weight_scale": torch.ones(())}),
    "config-json": lambda t, m: t.update(
        {f"{LAYER}.comfy_quant": torch.cat([t[f"{LAYER}.comfy_quant"], torch.zeros(3, dtype=torch.uint8)])}
    ),
    "config-dtype": lambda t, m: t.update({f"{LAYER}.comfy_quant": t[f"{LAYER}.comfy_quant"].to(torch.int32)}),
    "format": lambda t, m: (
        t.update({f"{LAYER}.comfy_quant": torch.frombuffer(bytearray(b'{"format":"nf5"}'), dtype=torch.uint8)}),
        m.pop("_quantization_metadata"),
    ),
    "tensor-shape": lambda t, m: t.update({f"{LAYER}.weight_scale_2": t[f"{LAYER}.weight_scale_2"].reshape(1)}),
    "scale-value": lambda t, m: t[f"{LAYER}.weight_scale_2"].fill_(float("nan")),
    "bias-shape": lambda t, m: t.update({f"{LAYER}.bias": torch.zeros(5)}),
    "header-sync": lambda t, m: m.update(
        {"_quantization_metadata": m["_quantization_metadata"].replace("nvfp4", "mxfp8", 1)}
    ),
    "header-json": lambda t, m: m.update({"_quantization_metadata": "{"}),
    "input-scale": lambda t, m: t.update({f"{LAYER}.input_scale": torch.ones(1)}),
}


@pytest.mark.parametrize("code", DEFECTS)
def test_verify_finds_each_defect(code, source, tmp_path):
    report = check_file(broken(source, tmp_path, DEFECTS[code]))
    assert code in {f.code for f in report.errors}
    assert all(
        f.message and (LAYER in f.message or f.code in ("header-json", "orphan"))
        for f in report.errors
        if f.code == code
    )


W4A8_WIDTHS = (256, 320, 640, 1152, 1408, 1920, 3360)  # the kernels rotate by 256


@pytest.fixture
def widths(tmp_path):
    path = tmp_path / "widths.safetensors"
    save_file({f"blocks.{k}.mlp.weight": torch.randn(32, k).bfloat16() for k in W4A8_WIDTHS}, path)
    return path


def test_widths_that_w4a8_kernels_refuse_are_kept_and_the_plan_says_why(widths, tmp_path):
    request = Request(widths, tmp_path / "o.safetensors", Recipe(get_format("asym_w4a8_int8")))
    with open_source(widths) as src:
        plan = make_plan(src, request)
    assert [layer.layer for layer in plan.quantized] == ["blocks.256.mlp"]
    assert all(
        f"in_features={layer.shape[1]} is not a multiple of rotation group 256" in layer.reason for layer in plan.kept
    )
    convert(request)
    assert check_file(request.target).findings == ()


def test_widths_that_w4a8_kernels_refuse_get_the_fallback(widths, tmp_path):
    policy = Policy(fallback=Recipe(get_format("int8_convrot")))
    request = Request(widths, tmp_path / "o.safetensors", Recipe(get_format("asym_w4a8_int8")), policy)
    convert(request)
    report = check_file(request.target)
    assert report.findings == ()
    w4a8 = {layer.layer for layer in report.layers if layer.format == "asym_w4a8_int8"}
    assert len(report.layers) == len(W4A8_WIDTHS) and w4a8 == {"blocks.256.mlp"}


@pytest.mark.parametrize(("rotation", "k"), [(16, 512), (64, 320), (64, 640), (1024, 1024)])
@pytest.mark.parametrize("header", [True, False])
def test_verify_and_repair_name_a_w4a8_layer_that_stops_when_it_runs(rotation, k, header, tmp_path):
    """However the file was made: comfy-kitchen's encoder writes these without a word."""
    codes, s_rel, s_channel, _, codebook = quantize_w4a8_int8_weight(torch.randn(32, k), 16, rotation)
    config = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": rotation}
    tensors = {
        "blocks.0.mlp.weight": codes,
        "blocks.0.mlp.weight_s_rel": s_rel,
        "blocks.0.mlp.weight_s_channel": s_channel,
        "blocks.0.mlp.weight_codebook": codebook,
        "blocks.0.mlp.comfy_quant": encode_config(config),
    }
    metadata = {HEADER_KEY: build_header_metadata({"blocks.0.mlp": config})} if header else {}
    path = tmp_path / "kitchen.safetensors"
    save_file(tensors, path, metadata)
    (finding,) = check_file(path).errors
    assert (finding.code, finding.layer) == ("kernel-refuses", "blocks.0.mlp")
    assert f"rotation group is {rotation}" in finding.message and "Quantize the source again" in finding.message
    with open_source(path) as src:
        assert [one.message for one in repair(src).unfixed] == [finding.message]


def test_verify_against_finds_a_wrong_layer_and_a_changed_copy(source, tmp_path):
    def damage(tensors, metadata):
        tensors[f"{LAYER}.weight"].random_(0, 256)
        tensors["pos_embed"][0, 0, 0] += 1

    report = verify_file(broken(source, tmp_path, damage), against=source)
    assert {f.code for f in report.errors} == {"large-error", "copy-differs"}
    save_file(tiny_model(seed=9), tmp_path / "other.safetensors")
    other = verify_file(tmp_path / "good.safetensors", against=tmp_path / "other.safetensors")
    assert {f.code for f in other.errors} == {"large-error", "copy-differs"}


# ---- memory ---------------------------------------------------------------------------------------------------------
MEMORY_SCRIPT = """
from comfyui_quantpress.cli.shared.heap import give_freed_weights_back
give_freed_weights_back()
import sys
from pathlib import Path
from comfyui_quantpress.quant_core.pipeline.request import Request
from comfyui_quantpress.quant_core.pipeline.run import convert
from comfyui_quantpress.quant_core.policy.recipe import Recipe, parse_recipe
from comfyui_quantpress.quant_core.formats import get_format
convert(Request(Path(sys.argv[1]), Path(sys.argv[2]), Recipe(get_format(sys.argv[3]))))
# Not ru_maxrss: a child inherits its parent's there.
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
needs_proc = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads the peak memory from /proc, which only Linux has"
)


@needs_proc
@pytest.mark.parametrize("name", ["float8_e4m3fn", "nvfp4"])
def test_memory_does_not_grow_with_the_file(name, tmp_path):
    peaks = []
    for blocks in (6, 24):
        path = tmp_path / f"{blocks}.safetensors"
        save_file({f"blocks.{i}.w.weight": torch.randn(2048, 2048).bfloat16() for i in range(blocks)}, path)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY_SCRIPT, path, tmp_path / f"o{blocks}.safetensors", name],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 40, f"{peaks} MiB; 18 more layers of 8 MiB"


@needs_proc
def test_the_plan_estimates_the_peak(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({f"blocks.{i}.w.weight": torch.randn(4096, 2048).bfloat16() for i in range(3)}, path)
    with open_source(path) as src:
        estimate = make_plan(src, Request(src.path, Path("planned"), Recipe(get_format("nvfp4")))).peak_bytes
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, path, tmp_path / "o.safetensors", "nvfp4"],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = int(done.stdout) * 1024
    assert measured < estimate * 1.25 and estimate < measured * 2, (measured, estimate)


# ---- the general policy ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "layer",
    [
        "final_layer.linear",
        "model.diffusion_model.final_layer.linear",
        "context_embedder",
        "double_blocks.0.img_mod.lin",
        "img_in",
        "txt_in",
        "time_in.in_layer",
        "vector_in.in_layer",
        "guidance_in.in_layer",
        "single_blocks.1.modulation.lin",
        "head.head",
        "text_embedding.0",
        "time_projection.1",
        "transformer_blocks.4.img_mod.1",
        "norm_out.linear",
        "proj_out",
        "cap_embedder.1",
        "model.diffusion_model.label_emb.0.0",
        "first_stage_model.decoder.mid.attn_1.q",
        "adaln_single.linear",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1",
        "blocks.0.adaLN_modulation.1",
        "patchify_proj",
        "double_blocks.0.img_attn.norm.query_norm",
        "lm_head",
        "shared",
        "model.embed_tokens",
    ],
)
def test_sensitive_layers_are_kept(layer):
    assert name_rule(layer)


@pytest.mark.parametrize(
    "layer",
    [
        "joint_blocks.0.x_block.attn.qkv",
        "double_blocks.0.img_attn.qkv",
        "single_blocks.1.linear1",
        "blocks.3.self_attn.q",
        "blocks.3.ffn.0",
        "transformer_blocks.4.attn.to_q",
        "transformer_blocks.4.attn.to_out.0",
        "layers.3.feed_forward.w1",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k",
        "transformer_blocks.0.ff.net.2",
        "encoder.block.3.layer.1.DenseReluDense.wi_1",
        "model.layers.3.mlp.gate_proj",
    ],
)
def test_block_layers_are_quantized(layer):
    assert name_rule(layer) is None


@pytest.mark.parametrize(
    "device, words",
    [
        ("nosuch", "no such device"),
        ("cuda:x", "no such device"),
        ("cpu ", "no such device"),
        ("cuda:99", "CUDA device"),
        ("meta", "no such device"),
    ],
)
def test_devices_that_are_not_there_are_refused(device, words):
    with pytest.raises(RequestError, match=words):
        pick_device(device)
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
