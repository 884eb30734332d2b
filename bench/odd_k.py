"""Runs layers of odd sizes through the layouts, and prints a JSON row for each: did it run, and was it right?

The sizes are those of real models that are not multiples of 256, and row counts at which kernels change. Each format
runs with every group size and rotation that its files may hold, whether or not the pack offers them for new files: so
the rows show what the kernels refuse, which is what `Runtime.limits` of a format says. A variant runs in a process of
its own, because a failed kernel can take the whole process with it.

Rows: format, group_size, rotation, offered (a new file would have it), route, N, K, M, bias, ok, error,
relative_error, and warning where comfy-kitchen logged that it decoded the weight instead. route "linear": an input as
it is; "both": the input quantized first, as ComfyUI does for FP8, NVFP4 and MXFP8 where the GPU multiplies them;
"dequantize": the weight alone, M null. relative_error: against the product with the decoded weight, over the length
that product has on average, so that a single output near 0 counts for nothing. ok: no exception, and an error below
what rounding the inputs to the format's own type gives. Without a GPU it runs on the CPU, where comfy-kitchen's
kernels take everything; then only the script is tried.

    python bench/odd_k.py [--formats stock|ours|NAME ...] [--out rows.jsonl] [--kinds] [--quick] [--every-route]
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import comfy_kitchen
import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfyui_quantpress.layouts import register_layouts, tensor_of_layer
from comfyui_quantpress.quant_core.errors import QuantPressError
from comfyui_quantpress.quant_core.formats import all_formats
from comfyui_quantpress.quant_core.formats.base import Format
from torch import Tensor
from torch.nn.functional import linear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
WIDTHS = (320, 640, 1152, 1408, 1920, 3360, 1024, 264, 100, 102, 90, 85)
OUTPUTS = (320, 1000, 322, 72, 8, 3, 1)
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 256, 600)
QUICK = {"widths": (320, 1024, 102), "outputs": (72, 3), "rows": (0, 1, 9)}
ROTATIONS = (16, 64, 256, 1024)
GROUP_SIZES = {"awq_w4a16": (32, 64, 128)}  # that its JSON can name, besides those that the pack offers
INPUT_QUANTIZED_BY_COMFYUI = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8")
# What a layout or a kernel raises. RuntimeError includes torch's own and those of the compiled extension.
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, KeyError, IndexError, QuantPressError)
PROCESSES = 4
WARNINGS: list[str] = []  # of the call that runs: comfy-kitchen says so where a kernel refused and it decoded instead


class Keeping(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        WARNINGS.append(record.getMessage())


def variants(names: list[str]) -> Iterator[Format]:
    """The formats of these names with every size that files may hold. names may hold "stock" and "ours"."""
    for fmt in all_formats():
        group = "ours" if fmt.runtime.native_since is None else "stock"
        if fmt.name not in names and group not in names:
            continue
        for size in GROUP_SIZES.get(fmt.name) or fmt.group_sizes or (fmt.group_size,):
            for rotation in ROTATIONS if fmt.rotation is not None else (None,):
                yield replace(fmt, group_size=size, rotation=rotation)


def sizes_of(fmt: Format, quick: bool) -> Iterator[tuple[int, int]]:
    """[N, K] that the format can store; whether a kernel runs it is the question."""
    free = replace(fmt, rotations=())
    for k in QUICK["widths"] if quick else WIDTHS:
        for n in (fmt.block_rows,) if fmt.block_rows > 1 else QUICK["outputs"] if quick else OUTPUTS:
            if free.misfit((n, k)) is None:
                yield n, k


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def limit(fmt: Format, route: str, outputs: int) -> float:
    """Of a relative error: what rounding inputs and outputs gives, and more where few outputs are averaged."""
    four_bit_inputs = fmt.name == "convrot_w4a4" or (fmt.name == "nvfp4" and route == "both")
    typical = 0.2 if four_bit_inputs else 0.05 if fmt.runtime.quantizes_input else 0.01
    return typical * (1 + 4 / math.sqrt(max(outputs, 1)))


def measured(fmt: Format, route: str, got: Tensor, want: Tensor, scale: float) -> dict[str, Any]:
    """got, want: the outputs, bias included. scale: the length that the product has on average."""
    if got.shape != want.shape:
        return {"ok": False, "error": f"shape {list(got.shape)}, not {list(want.shape)}", "relative_error": None}
    error = float((got.float() - want).norm()) / scale if want.numel() else 0.0
    ok = error < limit(fmt, route, want.numel())  # False for NaN
    return {
        "ok": ok,
        "error": None if ok else "wrong",
        "relative_error": round(error, 5) if math.isfinite(error) else None,
    }


def attempt(fmt: Format, route: str, weight: Any, decoded: Tensor, x: Tensor, bias: Tensor | None) -> dict[str, Any]:
    want = linear(x.float(), decoded, None if bias is None else bias.float())
    scale = float(x.float().norm() * decoded.norm()) / math.sqrt(decoded.shape[1])
    WARNINGS.clear()
    try:
        given = as_comfyui_gives(x, fmt, weight) if route == "both" else x
        got = linear(given, weight, bias)
        synchronize()
    except REFUSALS as err:
        return {"ok": False, "error": refusal(err), "relative_error": None}
    warned = {"warning": WARNINGS[0][:200]} if WARNINGS else {}
    return {**measured(fmt, route, got, want, max(scale, 1e-30)), **warned}


def as_comfyui_gives(x: Tensor, fmt: Format, weight: Any) -> QuantizedTensor:
    """The quantized input of a layer whose file has no input_scale."""
    scale = torch.ones((), device=DEVICE) if fmt.name.startswith("float8") else None
    return QuantizedTensor.from_float(x, weight._layout_cls, scale=scale)


def refusal(err: BaseException) -> str:
    synchronize()  # a kernel that failed has spoiled the device: this raises, and the process ends
    return f"{type(err).__name__}: {str(err).strip().splitlines()[0] if str(err).strip() else ''}"[:200]


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def routes_of(fmt: Format, every: bool) -> tuple[str, ...]:
    if fmt.name not in INPUT_QUANTIZED_BY_COMFYUI or not CUDA:
        return ("linear",)
    able = every or torch.cuda.get_device_capability() >= (fmt.runtime.min_capability or (0, 0))
    return ("linear", "both") if able else ("linear",)


def rows_of(fmt: Format, quick: bool, every_route: bool) -> Iterator[dict[str, Any]]:
    original = next(one for one in all_formats() if one.name == fmt.name)
    for n, k in sizes_of(fmt, quick):
        offered = (
            original.problem((n, k)) is None
            and (fmt.rotation is None or fmt.rotation in original.rotations)
            and fmt.refused_by_kernels((n, k)) is None
        )
        size = {"group_size": fmt.group_size, "rotation": fmt.rotation, "offered": offered, "N": n, "K": k}
        try:
            tensors = fmt.quantize(random((n, k), 1) * 0.02)
            weight = tensor_of_layer(fmt, tensors, (n, k), torch.bfloat16)
        except REFUSALS as err:
            yield {**size, "route": "make", "M": None, "bias": False, "ok": False, "error": refusal(err)}
            continue
        decoded = fmt.dequantize(tensors, (n, k)).float()
        yield {**size, "route": "dequantize", "M": None, "bias": False, **dequantized(fmt, weight, decoded)}
        for route in routes_of(fmt, every_route):
            for m in QUICK["rows"] if quick else ROWS:
                for bias in (None, (random((n,), 3) * 0.1).bfloat16()):
                    row = {**size, "route": route, "M": m, "bias": bias is not None}
                    yield {**row, **attempt(fmt, route, weight, decoded, random((m, k), 2).bfloat16(), bias)}


def dequantized(fmt: Format, weight: Any, decoded: Tensor) -> dict[str, Any]:
    try:
        got = weight.dequantize()
        synchronize()
    except REFUSALS as err:
        return {"ok": False, "error": refusal(err), "relative_error": None}
    weight_only = replace(fmt, runtime=replace(fmt.runtime, quantizes_input=False))
    return measured(weight_only, "dequantize", got, decoded, max(float(decoded.norm()), 1e-30))


def run_variant(index: int, arguments: argparse.Namespace) -> None:
    """Print the rows of one variant, in this process."""
    logging.getLogger("comfy_kitchen").addHandler(Keeping(logging.WARNING))
    comfy_kitchen.registry.disable("triton")  # as ComfyUI does
    register_layouts()
    fmt = list(variants(arguments.formats))[index]
    with torch.inference_mode():
        for row in rows_of(fmt, arguments.quick, arguments.every_route):
            print(json.dumps({"format": fmt.name, **row}), flush=True)


def start_variant(index: int, fmt: Format, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one variant, from a process of its own, and one more where that ended early."""
    call = [sys.executable, __file__, "--variant", str(index), "--formats", *arguments.formats]
    call += ["--quick"] * arguments.quick + ["--every-route"] * arguments.every_route
    done = subprocess.run(call, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        after = {key: rows[-1][key] for key in ("N", "K", "M", "route")} if rows else {}
        rows.append(
            {
                "format": fmt.name,
                "group_size": fmt.group_size,
                "rotation": fmt.rotation,
                **after,
                "ok": False,
                "error": f"the process ended ({done.returncode}) after this row: {last[0][:300]}",
            }
        )
    return rows


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line per kind of failure: what, how often, for which sizes."""
    failed = [row for row in rows if not row["ok"]]
    kinds = Counter((r["format"], r["group_size"], r["rotation"], r.get("route"), r["error"]) for r in failed)
    for kind, count in sorted(kinds.items(), key=str):
        same = [r for r in failed if (r["format"], r["group_size"], r["rotation"], r.get("route"), r["error"]) == kind]
        offered = sum(bool(r.get("offered")) for r in same)
        sizes = {key: sorted({r[key] for r in same if r.get(key) is not None}) for key in ("N", "K", "M", "bias")}
        yield f"{kind} {count}x, {offered} of them offered: {sizes}"
    yield f"{len(rows)} rows, {len(failed)} failed, {sum(bool(r.get('offered')) for r in failed)} of them offered"


def kinds_of(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the rows say, in one row for each variant, route and outcome: how many, of which sizes."""
    same = ("machine", "torch", "kitchen", "format", "group_size", "rotation", "route", "ok", "error")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        what = {key: row.get(key) for key in same}
        if what["error"]:
            what["error"] = re.sub(r"\d+x\d+", "NxK", re.sub(r"but got.*", "but got another", what["error"]))
        groups.setdefault(json.dumps(what), []).append(row)
    for what, found in groups.items():
        sizes = {
            key: sorted({row[key] for row in found if row.get(key) is not None}) for key in ("N", "K", "M", "bias")
        }
        errors = [row["relative_error"] for row in found if row.get("relative_error") is not None]
        yield {**json.loads(what), "rows": len(found), **sizes, "largest_error": max(errors, default=None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=["stock"], help="names, or stock (the default), or ours")
    parser.add_argument("--out", type=Path, help="write the rows to this file, and print only a summary")
    parser.add_argument("--kinds", action="store_true", help="one row for each variant, route and outcome")
    parser.add_argument("--quick", action="store_true", help="a few sizes, to try the script")
    parser.add_argument(
        "--every-route",
        action="store_true",
        help="quantize the inputs also for formats that this GPU does not multiply: what is refused before its kernel",
    )
    parser.add_argument("--variant", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant is not None:
        run_variant(arguments.variant, arguments)
        return
    common = {
        "machine": torch.cuda.get_device_name() if CUDA else "CPU",
        "torch": torch.__version__,
        "kitchen": version("comfy-kitchen"),
    }
    chosen = list(variants(arguments.formats))
    with ThreadPoolExecutor(PROCESSES if CUDA else 1) as pool:
        found = pool.map(lambda one: start_variant(*one, arguments), list(enumerate(chosen)))
        rows = [{**common, **row} for part in found for row in part]
    lines = [json.dumps(row) for row in (kinds_of(rows) if arguments.kinds else rows)]
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        print("\n".join(lines))
    print(*summary(rows), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
