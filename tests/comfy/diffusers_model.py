"""Run by ComfyUI's Python: the SD3-type model of a file under diffusers' names, by ComfyUI's own table.

diffusers_model.py COMFYUI_DIR SOURCE TARGET
"""

import sys

comfyui, source, target = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.utils  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

state, renamed = load_file(source), {}
for name, place in comfy.utils.mmdit_to_diffusers({"depth": 4, "num_blocks": 4}).items():
    own, rows, *change = (place, None) if isinstance(place, str) else place
    if own in state:
        part = state[own] if rows is None else state[own].narrow(*rows)
        renamed[name] = (
            (change[0](part) if change else part).contiguous().clone()
        )  # swapping halves is its own inverse
save_file(renamed, target)
