"""How much slower a sampling is while it is watched, in ComfyUI.

The model is a Flux of real widths with random weights, at 1024 x 1024.
"""

from __future__ import annotations

import subprocess
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from comfy_server import COMFYUI, PYTHON
from rig import MODEL, ROOT, Drawing, Row, Server, make_base, one_by_one

LARGE = "random_large"
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "no Hessians": {"hessians": False, "device_gb": 16.0},
    "Hessians": {"hessians": True, "device_gb": 16.0},
    "Hessians, 32 rows": {"hessians": True, "device_gb": 16.0, "rows_per_step": 32},
    "Hessians, defaults": {"hessians": True},
    "plain again": None,
}
MODES = {"default": (), "no dynamic vram": ("--disable-dynamic-vram",)}

BUILD = """
import sys
sys.path.insert(0, sys.argv[1]); target, width, single = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sys.argv = ["main.py", "--cpu"]
import torch, comfy.options
comfy.options.enable_args_parsing()
import comfy.ldm.flux.model, comfy.ops
from safetensors.torch import save_file
model = comfy.ldm.flux.model.Flux(
    image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096,
    hidden_size=width, mlp_ratio=4.0, num_heads=width // 128, depth=1, depth_single_blocks=single,
    axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, txt_ids_dims=[], guidance_embed=False, dtype=torch.bfloat16,
    device="meta", operations=comfy.ops.disable_weight_init)
device, state = "cuda" if torch.cuda.is_available() else "cpu", {}
generator = torch.Generator(device).manual_seed(7)
for key, value in model.state_dict().items():
    w = torch.randn(value.shape, generator=generator, device=device)
    scale = value[0].numel() ** -0.5 if value.dim() > 1 else 0.02
    state[key] = (w * scale + (value.dim() == 1 and key.endswith("scale"))).to(torch.bfloat16).cpu().contiguous()
save_file(state, target, {"format": "pt"})
print(sum(v.numel() for v in state.values()))
"""


def build(target: Path, width: int, single: int) -> int:
    """Numbers in the model."""
    done = subprocess.run(
        [str(PYTHON), "-c", BUILD, str(COMFYUI), str(target), str(width), str(single)],
        cwd=COMFYUI,
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )
    if done.returncode:
        raise RuntimeError(f"building the large model failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def measure(folder: Path, row: Row, small: bool) -> list[BaseException]:
    folder.mkdir(parents=True, exist_ok=True)
    target, width, single, side, steps = folder / f"{LARGE}.safetensors", 3072, 4, 1024, (4, 20)
    if small:
        width, single, side, steps = 256, 1, 128, (1, 3)
    jobs = {"build": lambda: row(what="model", numbers=build(target, width, single), width=width, side=side)}
    for mode, arguments in MODES.items():
        jobs[mode] = partial(_mode, folder, row, mode, arguments, target, side, steps)
    return one_by_one(jobs, row)


def _mode(
    folder: Path, row: Row, mode: str, arguments: tuple[str, ...], target: Path, side: int, steps: tuple[int, int]
) -> None:
    base = make_base(
        folder / f"timing-{mode.replace(' ', '-')}", {LARGE: target, MODEL: ROOT / "assets/tiny_mmdit_256.safetensors"}
    )
    with Server(base, *arguments) as server:
        info = server.call("/object_info")
        for model, edge, kind in ((LARGE, side, "noise"), (MODEL, 128, "demo shapes")):
            _ways(server, info, row, mode, model, edge, kind, steps)


def _ways(
    server: Server, info: Any, row: Row, mode: str, model: str, side: int, kind: str, steps: tuple[int, int]
) -> None:
    """Whole runs, and per step that of a long run less a short one; medians of three; the ways take turns."""
    drawn: dict[str, list[float]] = {way: [] for way in WAYS}
    whole: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(4):  # the first one loads and warms up
        for way, settings in WAYS.items():
            seconds = [
                _sample(server, info, model, side, kind, settings, count, 100 * turn + count + list(WAYS).index(way))
                for count in steps
            ]
            if turn:
                drawn[way].append((seconds[1] - seconds[0]) / (steps[1] - steps[0]) * 1e3)
                whole[way].append(seconds[1])
    plain, plain_run = (median(times["plain"] + times["plain again"]) for times in (drawn, whole))
    for way, times in drawn.items():
        row(
            what="timing",
            mode=mode,
            model=model,
            side=side,
            way=way,
            ms_per_step=median(times),
            least=min(times),
            most=max(times),
            slowdown_percent=(median(times) / plain - 1) * 100,
            steps=steps[1],
            run_s=median(whole[way]),
            run_slowdown_percent=(median(whole[way]) / plain_run - 1) * 100,
        )


def _sample(
    server: Server, info: Any, model: str, side: int, kind: str, settings: dict[str, Any] | None, steps: int, seed: int
) -> float:
    """Seconds that the sampler ran; another seed each time, so that nothing is cached."""
    graph = Drawing(info, model, side, kind)
    node = graph.original if settings is None else graph.capture(**settings)
    graph.save(graph.draw(node, 1, seed, steps), "timing")
    started = time.monotonic()
    entry = server.call(f"/history/{_finished(server, graph)}").popitem()[1]
    times = {name: detail["timestamp"] for name, detail in entry["status"]["messages"] if "timestamp" in detail}
    whole = (times["execution_success"] - times["execution_start"]) / 1e3
    return whole if whole > 0 else time.monotonic() - started


def _finished(server: Server, graph: Drawing) -> str:
    prompt = server.submit(graph)
    server.wait(prompt)
    return prompt
