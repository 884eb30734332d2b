"""Run by ComfyUI's Python: the shapes of whole models, without weights, and what ComfyUI takes given shapes for.

    plans_script.py COMFYUI_DIR -        started by tiny_models.py's Worker, which sends it one JSON line per task
A task names a function below and its arguments; its result is the answer, one JSON line.
"""

import json
import os
import sys

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what ComfyUI prints must not get among the answers

import read_architectures as read  # noqa: E402
import torch  # noqa: E402

CODES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
CODES |= {"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "I32": torch.int32}


def diffusion_model(name, variant):
    """The tensors of the model, as its file has them, and its linear layers; null where this ComfyUI lacks it."""
    entry = read.CONFIGS[name]
    built = read.built_diffusion_model(entry["variants"][variant])
    if built is None:
        return None
    tensors, kinds = built[1].state_dict(), read.kinds(built[1])
    return answer(tensors, kinds, entry.get("prefix", ""))


def text_encoder(name):
    entry = read.TEXT_ENCODERS[name]
    cls = read.class_of(entry)
    if cls is None:
        return None
    return answer(*read.in_file(entry, read.built(cls, entry.get("configs", [{}])[0])), "")


def answer(tensors, kinds, prefix):
    return {
        "shapes": {prefix + name: list(tensor.shape) for name, tensor in tensors.items()},
        "linear": [prefix + name for name, kind in kinds.items() if kind == "linear"],
    }


def detect(encoder, tensors):
    """What ComfyUI takes a file of these tensors for. tensors: {name: [dtype code, shape]}."""
    state = {name: torch.empty(shape, dtype=CODES[code], device=read.META) for name, (code, shape) in tensors.items()}
    if encoder:
        return str(read.comfy.sd.detect_te_model(state))
    known = read.detect_diffusion_model(state)
    return [type(known).__name__, {key: str(value) for key, value in (known.unet_config if known else {}).items()}]


def main():
    read.prepare()
    tasks = {"diffusion_model": diffusion_model, "text_encoder": text_encoder, "detect": detect}
    for line in sys.stdin:
        task, arguments = json.loads(line)
        print(json.dumps(tasks[task](**arguments)), file=ANSWERS, flush=True)


main()
