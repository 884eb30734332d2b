"""Run by ComfyUI's Python: what ComfyUI bakes for every name that it knows for a layer, in tiny models.

    lora_script.py COMFYUI_DIR FOLDER
Writes for each family of lora_models.json a model, and some LoRAs with what ComfyUI makes of the model with each:
FOLDER/FAMILY/model.safetensors, lora-N.safetensors, baked-N.safetensors (the changed tensors, float32). Each LoRA
changes a row once; all of them together use every name that ComfyUI looks a layer up by, in turns of all adapters.
"""

import json
import logging
import sys
from pathlib import Path

comfyui, folder = sys.argv[1], Path(sys.argv[2])
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402
import torch  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.supported_models  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

STRENGTHS = (0.7, 1.0, -0.5)
RANK = 3
LARGEST = 2**17  # numbers; some models have parts whose size no setting changes
CPU = torch.device("cpu")
generator = torch.Generator().manual_seed(3)


def randn(*shape):
    return torch.randn(*shape, generator=generator) * 0.1


def lora(shape):
    n, k = shape[0], shape[1:]
    return {"lora_up.weight": randn(n, RANK, *[1] * (len(k) - 1)), "lora_down.weight": randn(RANK, *k)}


def peft(shape):
    return {"lora_B.weight": randn(shape[0], RANK), "lora_A.weight": randn(RANK, shape[1:].numel())}


def tucker(shape):
    n, k, kernel = shape[0], shape[1], shape[2:]
    if len(kernel) != 2:
        return lora(shape) | {"alpha": torch.tensor(2.0)}
    ones = [1] * len(kernel)
    parts = {"lora_up.weight": randn(n, RANK, *ones), "lora_down.weight": randn(RANK, k, *ones)}
    return parts | {"lora_mid.weight": randn(RANK, RANK, *kernel), "alpha": torch.tensor(2.0)}


def dora(shape):
    return lora(shape) | {"dora_scale": randn(shape[0], *[1] * (len(shape) - 1)) + 2, "alpha": torch.tensor(1.5)}


def dora_by_column(shape):
    if shape[0] == shape[1]:  # would be taken for rows
        return dora(shape)
    return lora(shape) | {"dora_scale": randn(1, shape[1], *[1] * (len(shape) - 2)) + 2}


def loha(shape):
    n, k, kernel = shape[0], shape[1], shape[2:]
    alpha = {"alpha": torch.tensor(2.0)}
    if len(kernel) == 2 and kernel.numel() > 1:
        parts = {f"hada_w{i}_a": randn(RANK, n) for i in (1, 2)} | {f"hada_w{i}_b": randn(RANK, k) for i in (1, 2)}
        return parts | {f"hada_t{i}": randn(RANK, RANK, *kernel) for i in (1, 2)} | alpha
    parts = {f"hada_w{i}_a": randn(n, RANK) for i in (1, 2)}
    return parts | {f"hada_w{i}_b": randn(RANK, shape[1:].numel()) for i in (1, 2)} | alpha


def split(size):
    return next((factor for factor in (4, 3, 2) if size % factor == 0), 1)


def lokr(shape):
    n, k, a, b = shape[0], shape[1], split(shape[0]), split(shape[1])
    if len(shape) not in (2, 4):  # ComfyUI multiplies wrongly there
        return {"lokr_w1": randn(a, b), "lokr_w2": randn(n // a, shape[1:].numel() // b)}
    return {"lokr_w1": randn(a, b), "lokr_w2": randn(n // a, k // b, *shape[2:]), "alpha": torch.tensor(9.0)}


def lokr_factored(shape):
    n, a, b = shape[0], split(shape[0]), split(shape[1])
    parts = {"lokr_w1_a": randn(a, 2), "lokr_w1_b": randn(2, b), "alpha": torch.tensor(2.0)}
    return parts | {"lokr_w2_a": randn(n // a, RANK), "lokr_w2_b": randn(RANK, shape[1:].numel() // b)}


def glora(shape):
    n, k = shape[0], shape[1]
    parts = {"a1.weight": randn(k, RANK), "a2.weight": randn(RANK, k), "b1.weight": randn(n, RANK)}
    return parts | {"b2.weight": randn(RANK, shape[1:].numel()), "alpha": torch.tensor(2.0)}


def old_glora(shape):
    n, k = shape[0], shape[1:].numel()
    parts = {"a2.weight": randn(k, RANK), "a1.weight": randn(RANK, k), "b2.weight": randn(n, RANK)}
    return parts | {"b1.weight": randn(RANK, k), "alpha": torch.tensor(2.0)}


def oft(shape):
    size = split(shape[0])
    return {"oft_blocks": randn(shape[0] // size, size, size), "alpha": torch.tensor(0.2)}


def boft(shape):
    if shape[0] % 8:
        return oft(shape)
    return {
        "oft_blocks": randn(2, shape[0] // 4, 4, 4),
        "alpha": torch.tensor(0.5),
        "rescale": randn(shape[0], *[1] * (len(shape) - 1)) + 1,
    }


def difference(shape):
    return {"diff": randn(*shape)}


def replaced(shape):
    return {"set_weight": randn(*shape)}


KINDS = (lora, dora, loha, lokr, peft, tucker, lokr_factored, glora, old_glora, oft, boft, dora_by_column, difference)


def model_of(config):
    config = dict(config)
    device = config.pop("device", "meta")  # some constructors read what they computed
    config = getattr(comfy.supported_models, config.pop("class"))(config)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=torch.device(device))
    state = {
        name: randn(*value.shape) + (1.0 if value.dim() < 2 else 0.0)
        for name, value in model.state_dict().items()
        if name.startswith("diffusion_model.") and value.is_floating_point() and value.numel() <= LARGEST
    }
    return model, state


def shape_of(target, state):
    key, *cut = (target,) if isinstance(target, str) else target
    shape = list(state[key].shape)
    if cut and cut[0] is not None:
        shape[0] = cut[0][2]
    return torch.Size(shape)


def rows_of(target, state):
    key, *cut = (target,) if isinstance(target, str) else target
    start, count = cut[0][1:] if cut and cut[0] is not None else (0, state[key].shape[0] if state[key].dim() else 1)
    return key, set(range(start, start + count))


def rounds(names, state):
    """LoRAs as {name: target}: no row is changed twice by one, where the order would count; every name is in one."""
    left = {name: rows_of(target, state) for name, target in names.items()}
    while left:
        used, chosen = {}, []
        for name, (key, rows) in left.items():
            if not used.setdefault(key, set()) & rows:
                used[key] |= rows
                chosen.append(name)
        yield {name: names[name] for name in chosen}
        left = {name: where for name, where in left.items() if name not in chosen}


def fits(target, state):
    """Whether the rows are there: ComfyUI's own table names some layers, and rows, that a model does not have."""
    key, *cut = (target,) if isinstance(target, str) else target
    if key.endswith("linear1.weight") and cut and cut[0][1] > 0 and cut[0][2] != state[key].shape[1]:
        return (
            sum(cut[0][1:]) == state[key].shape[0]
        )  # Flux 2's MLP: ComfyUI's rows are those of Flux; no tool writes it
    return key in state and (not cut or cut[0] is None or cut[0][1] + cut[0][2] <= state[key].shape[0])


def adapters(chosen, state):
    """The tensors of a LoRA for {name: target}, of one kind after the other."""
    tensors = {}
    for number, (name, target) in enumerate(chosen.items(), len(chosen)):
        shape = shape_of(target, state)
        kind = KINDS[number % len(KINDS)] if len(shape) > 1 else (difference, replaced)[number % 2]
        tensors |= {f"{name}.{part}": value for part, value in kind(shape).items()}
        bias = target.removesuffix("weight") + "bias" if isinstance(target, str) else ""
        if bias in state and bias not in chosen and number % 3 == 0:
            tensors[f"{name}.diff_b"] = randn(*state[bias].shape)
    return tensors


def control_lora(state):
    """As Black Forest Labs publishes those of Flux: a wider img_in, biases, and new norms, without a prefix."""
    shape = state["diffusion_model.img_in.weight"].shape
    tensors = {"img_in.lora_A.weight": randn(RANK, 2 * shape[1]), "img_in.lora_B.weight": randn(shape[0], RANK)}
    for layer in ("img_in", "double_blocks.0.img_attn.qkv", "single_blocks.1.linear2"):
        n, k = state[f"diffusion_model.{layer}.weight"].shape
        tensors.setdefault(f"{layer}.lora_A.weight", randn(RANK, k))
        tensors.setdefault(f"{layer}.lora_B.weight", randn(n, RANK))
        tensors[f"{layer}.lora_B.bias"] = randn(n)
    norms = [name for name in state if name.endswith("_norm.weight")]
    return tensors | {
        name.removeprefix("diffusion_model.").removesuffix("weight") + "scale": randn(*state[name].shape)
        for name in norms
    }


def uso_lora(state):
    """As ByteDance publishes USO for Flux."""
    tensors = {}
    for name, layer in (
        ("double_blocks.0.processor.qkv_lora1", "double_blocks.0.img_attn.qkv"),
        ("double_blocks.1.processor.qkv_lora2", "double_blocks.1.txt_attn.qkv"),
        ("double_blocks.0.processor.proj_lora1", "double_blocks.0.img_attn.proj"),
        ("double_blocks.1.processor.proj_lora2", "double_blocks.1.txt_attn.proj"),
        ("single_blocks.1.processor.qkv_lora", "single_blocks.1.linear1"),
        ("single_blocks.1.processor.proj_lora", "single_blocks.1.linear2"),
    ):
        n, k = state[f"diffusion_model.{layer}.weight"].shape
        tensors[f"{name}.down.weight"] = randn(RANK, k)
        tensors[f"{name}.up.weight"] = randn(3 * k if layer.endswith("linear1") else n, RANK)
    return tensors


def fun_lora(state):
    """As alibaba-pai publishes those of Wan Fun."""
    return {
        f"lora_unet__blocks_{block}_cross_attn_{part}.lora_{end}.weight": randn(*shape)
        for block in (0, 1)
        for part in "qk"
        for end, shape in (("down", (RANK, 48)), ("up", (48, RANK)))
    }


SPECIAL = {
    "flux": ((control_lora, comfy.lora_convert.convert_lora), (uso_lora, comfy.lora_convert.convert_uso_lora)),
    "wan_t2v": ((fun_lora, comfy.lora_convert.convert_lora),),
}


def write(family, config):
    place = folder / family
    place.mkdir()
    model, state = model_of(config)
    files = {name.removeprefix("diffusion_model."): value for name, value in state.items()}
    save_file(files, place / "model.safetensors")
    names = comfy.lora.model_lora_keys_unet(model, {})
    names = {name: target for name, target in names.items() if fits(target, state)}
    loras = [(adapters(chosen, state), comfy.lora_convert.convert_lora) for chosen in rounds(names, state)]
    loras += [(make(state), convert) for make, convert in SPECIAL.get(family, ())]
    for number, (tensors, convert) in enumerate(loras):
        strength = STRENGTHS[number % len(STRENGTHS)]
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        save_file(tensors, place / f"lora-{number}.safetensors", {"strength": str(strength)})
        patcher = comfy.model_patcher.ModelPatcher(model, CPU, CPU)
        loaded = comfy.lora.load_lora(convert(tensors), names)
        taken = patcher.add_patches(loaded, strength)
        assert len(taken) == len(loaded), set(loaded) - set(taken)
        baked = {
            key.removeprefix("diffusion_model."): comfy.lora.calculate_weight(patches, state[key].clone(), key)
            for key, patches in patcher.patches.items()
        }
        save_file({name: value.contiguous() for name, value in baked.items()}, place / f"baked-{number}.safetensors")


class Failures(logging.Handler):
    """ComfyUI logs what it cannot add, and goes on. Here that is an error of this script."""

    def emit(self, record):
        if any(word in record.getMessage() for word in ("ERROR", "MISMATCH", "not loaded", "NOT LOADED")):
            raise SystemExit(record.getMessage())


def main():
    logging.getLogger().addHandler(Failures())
    models = json.loads(Path(__file__).with_name("lora_models.json").read_text("utf-8"))
    for family, config in models.items():
        write(family, config)


main()
