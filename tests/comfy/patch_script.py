"""Run by ComfyUI's Python: merging, hooks, LoRAs and savers on quantized models, with ComfyUI's own nodes.

    patch_script.py COMFYUI_DIR PACK_DIR CHECK FOLDER
FOLDER holds plain.safetensors, other.safetensors and one file per format, quantized from the first; a failed check is
an AssertionError and a non-zero exit status.
"""

import asyncio
import io
import logging
import sys
from pathlib import Path

comfyui, pack_dir, check, folder = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu", "--disable-all-custom-nodes"]

import comfy.options  # noqa: E402
import torch  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.hooks  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
from comfy_extras import nodes_model_merging as merging  # noqa: E402
from comfy_kitchen.tensor import QuantizedTensor  # noqa: E402

import nodes  # noqa: E402

LOGGED = io.StringIO()
logging.getLogger().addHandler(logging.StreamHandler(LOGGED))
logging.getLogger().setLevel(logging.INFO)
assert asyncio.run(nodes.load_custom_node(pack_dir))
pack = lambda name: sys.modules[pack_dir.replace(".", "_x_") + "." + name]  # noqa: E731
FORMATS = {fmt.name: fmt for fmt in pack("quant_core.formats").all_formats()}
FILES = {path.stem: str(path) for path in Path(folder).glob("*.safetensors")}
QUANTIZED = [name for name in FILES if name in FORMATS]


def load(name, **options):
    return comfy.sd.load_diffusion_model(FILES[name], model_options=options)


def whole(weight):
    return (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.detach()).float()


def weights(patcher):
    """Every matrix of the model, decoded, and the biases."""
    net = patcher.model.diffusion_model
    return {name: whole(p).clone() for name, p in net.named_parameters() if not name.endswith("input_scale")}


def quantized_layers(patcher):
    net = patcher.model.diffusion_model
    return [name for name, m in net.named_modules() if isinstance(getattr(m, "weight", None), QuantizedTensor)]


def pieces(patcher):
    """The bits of all weights."""
    state = patcher.model.diffusion_model.state_dict()
    return {key: value.detach().clone().reshape(-1).view(torch.uint8) for key, value in state.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def loaded(patcher):
    comfy.model_management.load_models_gpu([patcher])
    return patcher


def unloaded(patcher):
    comfy.model_management.unload_all_models()
    return patcher


def far(got, wanted):
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-9))


def bound(name):
    """Of rounding a weight by chance: about twice the error of rounding to nearest."""
    return {4: 0.3, 8: 0.12}[FORMATS[name].element.bits if hasattr(FORMATS[name], "element") else 4]


def close(patcher, wanted, name):
    found, layers = weights(patcher), set(quantized_layers(patcher))
    assert found.keys() == wanted.keys()
    for key, weight in found.items():
        limit = bound(name) if key.removesuffix(".weight") in layers else 0.01
        assert far(weight, wanted[key]) < limit, (name, key, far(weight, wanted[key]))


MERGES = {
    "simple": (lambda a, b: merging.ModelMergeSimple().merge(a, b, 0.25), lambda x, y: 0.25 * x + 0.75 * y),
    "add": (lambda a, b: merging.ModelAdd().merge(a, b), lambda x, y: x + y),
    "subtract": (lambda a, b: merging.ModelSubtract().merge(a, b, 0.5), lambda x, y: 0.5 * x - 0.5 * y),
    "blocks": (lambda a, b: merging.ModelMergeBlocks().merge(a, b, input=0.5), lambda x, y: 0.5 * x + 0.5 * y),
}


def merged(kind, first, second, name):
    merge, formula = MERGES[kind]
    before = pieces(first)
    one, other = weights(first), weights(second)
    # ModelSubtract scales model1 by the multiplier too, as ComfyUI's patches do (strength_model).
    wanted = {key: formula(one[key], other[key]) for key in one}
    result = loaded(merge(first, second)[0])
    close(result, wanted, name)
    unloaded(result)
    assert same(before, pieces(first)), (kind, name, "the first model is changed")


def merging_a_quantized_model_into_a_plain_one():
    for name in QUANTIZED:
        for kind in MERGES:
            merged(kind, load("plain"), load(name), name)


def merging_a_plain_model_into_a_quantized_one():
    for name in QUANTIZED:
        for kind in MERGES:
            merged(kind, load(name), load("other"), name)


def merging_two_quantized_models():
    for name, second in zip(QUANTIZED, [*QUANTIZED[1:], QUANTIZED[0]], strict=True):
        for kind in MERGES:
            merged(kind, load(name), load(second), name)


def lora_for(patcher, size=0.2):
    """A LoRA of rank 4 on every quantized layer, as a file holds it, and its change of each weight."""
    torch.manual_seed(1)
    lora, change = {}, {}
    for layer in quantized_layers(patcher):
        n, k = patcher.get_model_object(f"diffusion_model.{layer}").weight.shape
        up, down = torch.randn(n, 4), torch.randn(4, k)
        scale = size * float(weights(patcher)[f"{layer}.weight"].norm() / (up @ down).norm())
        up = up * scale
        lora |= {f"diffusion_model.{layer}.lora_up.weight": up, f"diffusion_model.{layer}.lora_down.weight": down}
        change[f"{layer}.weight"] = up @ down
    return lora, change


def hooked(patcher, group, wanted, name):
    """Apply, restore, and apply again from what ComfyUI keeps for the next step."""
    before = pieces(patcher)
    patcher.patch_hooks(group)
    close(patcher, wanted, name)
    first = pieces(patcher)
    patcher.patch_hooks(None)
    assert same(before, pieces(patcher)), (name, "not restored")
    patcher.patch_hooks(group)
    again = pieces(patcher)
    changed = [key for key in first if not torch.equal(first[key], again[key])]
    assert not changed, (name, "another weight the second time", changed)
    patcher.patch_hooks(None)
    assert same(before, pieces(patcher)), (name, "not restored the second time")


def hooks_that_load_a_lora():
    for name in QUANTIZED:
        for mode in (comfy.hooks.EnumHookMode.MaxSpeed, comfy.hooks.EnumHookMode.MinVram):
            patcher = load(name)
            lora, change = lora_for(patcher)
            patcher, _, group = comfy.hooks.load_hook_lora_for_models(patcher, None, lora, 0.5, 0.0)
            patcher.set_hook_mode(mode)
            wanted = weights(patcher)
            wanted = {key: weight + 0.5 * change.get(key, 0) for key, weight in wanted.items()}
            hooked(loaded(patcher), group, wanted, name)
            unloaded(patcher)


def hooks_that_take_a_model_as_lora():
    for name, second in zip(QUANTIZED, ["other", *QUANTIZED[1:]], strict=True):
        patcher, other = load(name), load(second)
        given = comfy.hooks.get_patch_weights_from_model(other, discard_model_sampling=True)
        group = comfy.hooks.create_hook_model_as_lora(given, None, strength_model=0.5, strength_clip=0.0)
        patcher = patcher.clone()
        patcher.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
        one, two = weights(patcher), weights(other)
        hooked(loaded(patcher), group, {key: one[key] + 0.5 * (two[key] - one[key]) for key in one}, name)
        unloaded(patcher)


def saving_a_merged_model():
    """ModelSave: what it writes is what was sampled."""
    for name in QUANTIZED:
        result = merging.ModelMergeSimple().merge(load(name), load("other"), 0.5)[0]
        path = Path(folder) / "saved.safetensors"
        comfy.sd.save_checkpoint(str(path), result)
        again = comfy.sd.load_checkpoint_guess_config(str(path), output_clip=False, output_vae=False)[0]
        assert quantized_layers(again) == quantized_layers(result), name
        wanted = weights(loaded(result))
        found = weights(again)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found), name
        unloaded(result)
        path.unlink()


def a_stock_lora_is_one_line_in_the_log():
    for name in QUANTIZED:
        patcher = load(name)
        lora, change = lora_for(patcher)
        changed, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
        LOGGED.truncate(0)
        LOGGED.seek(0)
        wanted = {key: weight + change.get(key, 0) for key, weight in weights(patcher).items()}
        close(loaded(changed), wanted, name)
        lines = [line for line in LOGGED.getvalue().splitlines() if "which costs quality" in line]
        assert len(lines) == 1 and f"{len(change)} of {FORMATS[name].on_disk}" in lines[0], (name, lines)
        assert "Load LoRA (Bypass, Model Only)" in lines[0]
        unloaded(changed)
        LOGGED.truncate(0)
        loaded(patcher)
        assert "costs quality" not in LOGGED.getvalue()
        assert pack("layouts.comfyui_notes").notes_of(patcher) == []
        assert pack("layouts.comfyui_notes").notes_of(changed) == [lines[0].removeprefix("QuantPress: ")]
        unloaded(patcher)


def weight_dtype_fp8_is_one_line_in_the_log():
    for name in ("plain", *QUANTIZED):
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, None):
            LOGGED.truncate(0)
            LOGGED.seek(0)
            patcher = load(name) if dtype is None else load(name, dtype=dtype)
            lines = [line for line in LOGGED.getvalue().splitlines() if "Set weight_dtype to default" in line]
            assert len(lines) == (dtype is not None and name != "plain"), (name, dtype, lines)
            assert all(str(dtype).removeprefix("torch.") in line for line in lines)
            assert len(pack("layouts.comfyui_notes").notes_of(patcher)) == len(lines)


with torch.inference_mode():  # as ComfyUI executes nodes
    globals()[check]()
