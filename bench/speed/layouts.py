"""Times linear layers through the layouts, and prints one JSON row per format, shape and route.

Rows: bf16 F.linear; each of our formats through its layout and as dequantize-then-matmul (the torch specification of
decoding, then F.linear, which is what the layout does where it has no kernel); with --routes also every kernel that
can run the shape, which is what the thresholds in layouts/capability.py are read from; comfy-kitchen's native layouts;
bitsandbytes NF4. ms: the median over runs, by CUDA events on a GPU, inputs rotated so that no run finds the last one's
in the cache. relative_error: against the float32 product with the same stored weights, so it shows what the route adds
(activation rounding, output rounding), not the format. Asserts nothing. A package that is missing is a row that says
so.

    python bench/speed/layouts.py [--out rows.jsonl] [--routes]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from comfyui_quantpress.layouts import ability, register_layouts, tensor_of_layer
from comfyui_quantpress.layouts import linear as maths
from comfyui_quantpress.layouts.capability import kernels_read
from comfyui_quantpress.quant_core.formats import all_formats
from comfyui_quantpress.quant_core.formats.base import Format
from torch import Tensor
from torch.nn.functional import linear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = (
    [
        (1, 3072, 3072),
        (16, 3072, 3072),
        (256, 12288, 3072),
        (4096, 3072, 3072),
        (4096, 12288, 3072),
        (16384, 12288, 3072),
    ]
    if CUDA
    else [(1, 256, 256), (64, 512, 256)]
)
NATIVE = ("float8_e4m3fn", "int8_rowwise", "convrot_w4a4")
CACHE_BYTES = 128 << 20  # twice an H200's L2


def median_ms(call: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> float:
    for x in inputs[:2]:
        call(x)
    if not CUDA:
        return statistics.median(_wall_ms(call, x) for x in (inputs * 5)[:10])
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(inputs[0])
    torch.cuda.synchronize()
    count = max(10, min(100, int(0.1 / (time.perf_counter() - start))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for index, (before, after) in enumerate(events):
        before.record()
        call(inputs[index % len(inputs)])
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def _wall_ms(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    call(x)
    return (time.perf_counter() - start) * 1e3


def inputs_of(m: int, k: int) -> list[Tensor]:
    """Several sets, larger together than the cache. Heavy-tailed with a few strong channels, as activations are."""
    count = max(2, min(16, CACHE_BYTES // (m * k * 2) + 1))
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    strong = torch.ones(k, device=DEVICE)
    strong[:: k // 8] = 8.0
    return [
        (torch.randn((m, k), generator=generator, device=DEVICE) * strong).to(torch.bfloat16) for _ in range(count)
    ]


def our_routes(
    fmt: Format, tensors: dict[str, Tensor], shape: tuple[int, int], m: int, every: bool
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    qt = tensor_of_layer(fmt, tensors, shape, torch.bfloat16)
    weight = maths.weight_of(fmt.name, qt._qdata, qt._params)
    able = ability(qt._qdata.device)
    yield f"layout:{maths.linear_path(weight.geometry, m, torch.bfloat16, able)}", lambda x: linear(x, qt)
    yield "dequantize, then matmul", lambda x: linear(x, fmt.dequantize(tensors, shape).to(x.dtype))
    if not every or not kernels_read(weight.geometry, able):
        return
    yield "decode, then matmul", lambda x: linear(x, maths.decode(weight, x.dtype))
    if m <= 64:
        yield "gemv", lambda x: maths.gemv(x, weight, None)
    if m <= 1024:
        yield "decode_dot", lambda x: maths.decode_dot(x, weight, None)
    if weight.geometry.kind == "int8" or (weight.geometry.kind == "fp8" and able.fp8_dot):
        yield "scaled_dot", lambda x: maths.on_kernel("scaled_dot", x, weight, None)


def kitchen_route(fmt: Format, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    from comfy_kitchen.tensor import QuantizedTensor

    qt = tensor_of_layer(fmt, tensors, shape, torch.bfloat16)
    if fmt.name != "float8_e4m3fn":
        return lambda x: linear(x, qt)
    # ComfyUI quantizes an fp8 layer's input itself, per tensor.
    return lambda x: linear(QuantizedTensor.from_float(x, qt._layout_cls, scale="recalculate"), qt)


def bitsandbytes_route(w: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    stored = bnb.functional.dequantize_4bit(packed, state).float()
    return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state), stored


def measure(shape: tuple[int, int, int], every: bool) -> Iterator[dict[str, object]]:
    m, n, k = shape
    w = (torch.randn((n, k), generator=torch.Generator(device=DEVICE).manual_seed(1), device=DEVICE) * 0.02).to(
        torch.bfloat16
    )
    inputs = inputs_of(m, k)
    probe = inputs[0][:256]

    def row(name: str, route: str, call: Callable[[Tensor], Tensor], stored: Tensor) -> dict[str, object]:
        want = probe.float() @ stored.float().t()
        got = call(inputs[0])[:256].float()
        return {
            "format": name,
            "route": route,
            "ms": round(median_ms(call, inputs), 4),
            "relative_error": round(float((got - want).norm() / want.norm()), 5),
        }

    yield row("bfloat16", "F.linear", lambda x: linear(x, w), w)
    for fmt in all_formats():
        if fmt.runtime.native_since is not None and fmt.name not in NATIVE:
            continue
        tensors = fmt.quantize(w)
        stored = fmt.dequantize(tensors, (n, k))
        if fmt.runtime.native_since is not None:
            yield row(fmt.name, "comfy-kitchen", kitchen_route(fmt, tensors, (n, k)), stored)
            continue
        for route, call in our_routes(fmt, tensors, (n, k), m, every):
            yield row(fmt.name, route, call, stored)
    if find_spec("bitsandbytes") is None:
        yield {"format": "nf4", "route": "bitsandbytes", "missing": "bitsandbytes is not installed"}
    else:
        call, stored = bitsandbytes_route(w)
        yield row("nf4", "bitsandbytes", call, stored)


def machine() -> str:
    return torch.cuda.get_device_name() if CUDA else f"{platform.processor() or platform.machine()}, CPU"


def commit() -> str:
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the rows to this file too")
    parser.add_argument(
        "--routes", action="store_true", help="time every kernel that can run the shape, not only the chosen one"
    )
    parser.add_argument("--commit", help="the commit to record, where this copy has no git history")
    arguments = parser.parse_args()
    register_layouts()
    common = {"machine": machine(), "commit": arguments.commit or commit(), "torch": torch.__version__}
    with torch.inference_mode():
        for m, n, k in SHAPES:
            for found in measure((m, n, k), arguments.routes):
                line = json.dumps({**common, "M": m, "N": n, "K": k, **found})
                print(line, flush=True)
                if arguments.out:
                    with arguments.out.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    main()
