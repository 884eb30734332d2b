"""Run by ComfyUI's Python: tiny random models, quantized by the nodes, loaded by the stock loaders and run once.

    tiny_script.py COMFYUI_DIR PACK_DIR FOLDER        started by tiny_models.py, which sends it one JSON line per task
A task names a function below and its arguments; its result is the answer, one JSON line.
"""

import asyncio
import json
import logging
import os
import sys
from pathlib import Path

comfyui, pack_dir, folder = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu", "--disable-all-custom-nodes"]
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what ComfyUI prints must not get among the answers

import comfy.options  # noqa: E402
import torch  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_detection  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
from comfy_kitchen.tensor import QuantizedTensor  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import nodes  # noqa: E402

HERE = Path(__file__).parent
CONFIGS = json.loads((HERE / "architecture_configs.json").read_text("utf-8"))
MODELS = json.loads((HERE / "tiny_models.json").read_text("utf-8"))
CPU = torch.device("cpu")
outputs = {}  # of each model in 16 bits


class Logged(logging.Handler):
    """The lines that ComfyUI's loaders log about tensors that did not find their place."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def values(model, generator):
    """Random weights that keep activations in range, so that nothing is 0 and nothing explodes."""
    state = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            state[name] = tensor
        elif tensor.dim() > 1:
            state[name] = torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5
        else:
            about = 1.0 if name.endswith(("weight", "scale", "gamma")) else 0.0
            state[name] = about + 0.1 * torch.randn(tensor.shape, generator=generator)
    return {
        name: tensor.to(torch.bfloat16 if tensor.is_floating_point() else tensor.dtype).contiguous().clone()
        for name, tensor in state.items()
    }


def build(name, file):
    """Write the model as a bf16 file; what ComfyUI takes it for, and its output is kept as the reference."""
    entry = MODELS[name]
    family = CONFIGS[entry["family"]]
    config = {**family["variants"][entry["variant"]], **entry["change"]}
    config.pop("device", None)
    known = comfy.model_detection.model_config_from_unet_config(dict(config), None)
    known.custom_operations = comfy.ops.disable_weight_init
    known.set_inference_dtype(torch.bfloat16, None)
    generator = torch.Generator().manual_seed(7)
    beside = {key: torch.randn(shape, generator=generator) for key, shape in entry.get("beside", {}).items()}
    model = known.get_model(dict(beside), "", device=CPU).diffusion_model
    prefix = entry.get("checkpoint", "") + family.get("prefix", "")
    state = beside | {prefix + key: tensor for key, tensor in values(model, generator).items()}
    save_file(state, file, {"format": "pt", **entry.get("metadata", {})})
    found, output = loaded(name, file)
    outputs[name] = output
    return {**found, "expected": type(known).__name__, "spread": float(output.float().std())}


def inputs(entry):
    """What the model is given: noise of the shapes that the table says."""
    generator = torch.Generator().manual_seed(1)

    def noise(shape):
        if isinstance(shape, dict):
            return shape["value"]
        return torch.randn(shape, generator=generator) if isinstance(shape, list) else shape

    x, context = noise(entry["x"]), noise(entry["context"])
    return x, {"c_crossattn": context, **{key: noise(shape) for key, shape in entry.get("more", {}).items()}}


def loaded(name, file):
    """(what ComfyUI's stock loader makes of the file, the output of the diffusion model)."""
    logged = Logged()
    logging.getLogger().addHandler(logged)
    try:
        if "checkpoint" in MODELS[name]:
            patcher = comfy.sd.load_checkpoint_guess_config(file, output_vae=False, output_clip=False)[0]
        else:
            patcher = comfy.sd.load_diffusion_model(file)
    finally:
        logging.getLogger().removeHandler(logged)
    model = patcher.model
    weights = [getattr(module, "weight", None) for module in model.diffusion_model.modules()]
    layouts = [weight._layout_cls for weight in weights if isinstance(weight, QuantizedTensor)]
    raw = []
    model.diffusion_model.register_forward_hook(lambda module, given, out: raw.append(out))
    x, conds = inputs(MODELS[name])
    model.apply_model(x, torch.tensor([MODELS[name].get("sigma", 0.7)]), **conds)
    output = raw[0]
    output = torch.cat([part.flatten() for part in output]) if isinstance(output, (list, tuple)) else output
    found = {
        "class": type(model.model_config).__name__,
        "config": {key: str(value) for key, value in model.model_config.unet_config.items()},
        "logged": logged.lines,
        "quantized": len(layouts),
        "layouts": sorted(set(layouts)),
        "finite": bool(output.isfinite().all()),
    }
    return found, output.float()


def load(name, file):
    """What ComfyUI makes of a quantized file, and how far its output is from the 16-bit model's."""
    found, output = loaded(name, file)
    reference = outputs[name]
    return {**found, "error": float((output - reference).norm() / reference.norm())}


def by_node(name, file, format):
    """Quantize Model and Save Quantized Model, as the graph runs them; the saved file."""
    made = {kind: nodes.NODE_CLASS_MAPPINGS[kind] for kind in ("QuantPressLoadSource", "QuantPressQuantize")}
    source = run(made["QuantPressLoadSource"], file=f"diffusion_models/{Path(file).name}")
    quantized = run(
        made["QuantPressQuantize"],
        source=source,
        format=format,
        group_size="automatic",
        scales="absmax",
        rounding="nearest",
        seed=0,
        keep="",
        only="",
        fallback="keep in source dtype",
        device="auto",
    )
    save = nodes.NODE_CLASS_MAPPINGS["QuantPressSave"]
    listed = run(save, quantized=quantized, folder="output", name=f"{name}-{format}", overwrite=True)
    return {"file": str(Path(folder_paths.get_output_directory(), listed))}


def run(node, **values):
    """The first output of a node, executed as ComfyUI does it."""
    return node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).execute(**values).result[0]


TASKS = {"build": build, "load": load, "by_node": by_node}


def main():
    for name in ("output", "temp"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    folder_paths.set_output_directory(os.path.join(folder, "output"))
    folder_paths.set_temp_directory(os.path.join(folder, "temp"))
    folder_paths.add_model_folder_path("diffusion_models", folder, is_default=True)
    assert asyncio.run(nodes.load_custom_node(pack_dir))
    for line in sys.stdin:
        task, arguments = json.loads(line)
        with torch.inference_mode():
            answer = TASKS[task](**arguments)
        print(json.dumps(answer), file=ANSWERS, flush=True)


main()
