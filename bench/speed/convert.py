"""Streaming conversion: throughput and peak memory per format, beside a plain copy of the file. Prints JSON rows.

    python bench/speed/convert.py [--gigabytes 8] [--formats nvfp4,bnb_nf4] [--folder DIR] [--double]

The file holds DiT-like layers in bf16 (3072 wide, the largest 12288 x 3072). Each conversion is a process of its own:
its time includes start-up, reading, quantizing, measuring each layer's error, writing, fsync and verification. Peak
memory is the process's VmHWM. --double also converts a file twice as long, to show that memory does not grow. The
peer's figures on two cores: convert_to_quant 1.3.1 --simple 14 to 56 MB/s at 2.2 to 2.8 times the input in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from comfyui_quantpress.quant_core.checkpoint.header import OutputTensor
from comfyui_quantpress.quant_core.checkpoint.sink import open_sink
from comfyui_quantpress.quant_core.formats import all_formats

WIDTH = 3072
CHILD = """
import json, sys, time
from comfyui_quantpress.cli.main import main
code = main(sys.argv[1:])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"code": code, "peak_rss_bytes": peak * 1024}), file=sys.stderr)
"""


def generate(path: Path, gigabytes: float) -> None:
    """Blocks of attention (qkv, proj) and feed-forward layers; one block's random weights serve them all."""
    shapes = {
        "attn.qkv": (3 * WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.fc1": (4 * WIDTH, WIDTH),
        "mlp.fc2": (WIDTH, 4 * WIDTH),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in shapes.items()}
    block_bytes = sum(w.nbytes for w in weights.values())
    count = max(1, round(gigabytes * 1e9 / block_bytes))
    entries = [
        OutputTensor(f"blocks.{i}.{name}.weight", "BF16", tuple(w.shape))
        for i in range(count)
        for name, w in weights.items()
    ]
    with open_sink(path, entries, {}) as sink:
        for entry in entries:
            sink.write(entry.name, weights[".".join(entry.name.split(".")[2:4])])
        sink.commit()


def row(name: str, size: int, seconds: float, **more: object) -> None:
    print(
        json.dumps(
            {
                "bench": "convert",
                "format": name,
                "input_bytes": size,
                "seconds": round(seconds, 2),
                "mb_per_s": round(size / 1e6 / seconds, 1),
                **more,
            }
        ),
        flush=True,
    )


def convert(name: str, source: Path, target: Path) -> tuple[float, int]:
    began = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            CHILD,
            "quantize",
            str(source),
            str(target),
            "--format",
            name,
            "--overwrite",
            "--device",
            "cpu",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    seconds = time.monotonic() - began
    result = json.loads(done.stderr.strip().splitlines()[-1])
    if result["code"]:
        raise SystemExit(done.stderr)
    return seconds, result["peak_rss_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--formats", default=",".join(f.name for f in all_formats()))
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--double", action="store_true")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        json.dumps(
            {
                "bench": "convert",
                "machine": platform.processor() or platform.machine(),
                "cores": len(os.sched_getaffinity(0)),
                "torch": torch.__version__,
                "commit": commit,
            }
        ),
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, target = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
        for factor in (1, 2) if args.double else (1,):
            source.unlink(missing_ok=True)
            generate(source, args.gigabytes * factor)
            size = source.stat().st_size
            began = time.monotonic()
            shutil.copyfile(source, target)
            with open(target, "rb") as copied:
                os.fsync(copied.fileno())
            row("plain copy", size, time.monotonic() - began)
            for name in args.formats.split(","):
                seconds, peak = convert(name, source, target)
                row(name, size, seconds, peak_rss_bytes=peak, output_bytes=target.stat().st_size)


if __name__ == "__main__":
    main()
