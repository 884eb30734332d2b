"""The pack in a real ComfyUI on a GPU: memory modes, capture, LoRAs, timing, a calibration's worth. JSON rows.

    COMFYUI_ARGS="" COMFYUI_DIR=... COMFYUI_PYTHON=... python bench/comfyui/gpu.py PART ... --out ROWS.jsonl

modes    in-graph and reloaded models, capture, LoRA, in every memory mode at once, beside the same on the CPU
timing   a sampling of a model of 1.5 GB, watched and not
proof    nearest, search and gptq per format, judged by pictures and single steps (--precision bf16 fp32)
curve    the gain by the number of prompts and steps
floor    the unquantized model in bf16 against float32
Parts are independent; one that fails leaves a row and the log's end, and the next goes on.
--small: a quick look that it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

# The modules beside this one use the server of ComfyUI's tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/comfy"))
import modes  # noqa: E402 - after the path that it needs; so are the next ones
import proof  # noqa: E402
import timing  # noqa: E402
from rig import Row  # noqa: E402

PARTS = ("modes", "timing", "proof", "curve", "floor")
CURVE, CURVE_STEPS, CURVE_FORMATS = (
    (1, 2, 4, 8, 16, 40, 80),
    (1, 2, 4, 8),
    ("nvfp4", "bnb_nf4", "int8_blockwise", "float8_e4m3fn"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="rows are added to this file")
    parser.add_argument("--work", type=Path, default=Path("/tmp/comfy_gpu"), help="base folders and logs")
    parser.add_argument("--servers", type=int, default=8)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--formats", nargs="+", default=list(proof.FORMATS))
    parser.add_argument("--prompts", type=int, default=40, help="of the proof's calibration")
    parser.add_argument(
        "--methods", nargs="+", default=[], choices=list(proof.METHODS), help="of the proof; nearest first"
    )
    parser.add_argument("--modes", nargs="+", default=list(modes.MODES), choices=list(modes.MODES))
    parser.add_argument("--jobs", default="", help="regular expression: only these jobs of modes")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    lock, failed = threading.Lock(), 0
    args.work.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        started = time.monotonic()
        errors = run(part, args, row_writer(part, args.out, lock, started))
        failed += len(errors)
        print(f"--- {part}: {time.monotonic() - started:.0f} s, {len(errors)} failed", flush=True)
        if errors:
            keep_logs(args.work, args.out.with_suffix(".log"))
    return 1 if failed else 0


def row_writer(part: str, out: Path, lock: threading.Lock, started: float) -> Row:
    """A function that adds its named values to the file as one row, and prints them."""

    def row(**values: Any) -> None:
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        text = json.dumps({"part": part, **rounded, "at_s": round(time.monotonic() - started, 1)})
        with lock, open(out, "a", encoding="utf-8") as file:
            file.write(text + "\n")
        print(" ".join(f"{key}={value}" for key, value in rounded.items() if key != "part")[:320], flush=True)

    return row


def keep_logs(work: Path, target: Path) -> None:
    """The end of every server's log, in one file."""
    with open(target, "a", encoding="utf-8") as file:
        for log in sorted(work.glob("*/server_*.log")):
            file.write(f"===== {log}\n{log.read_text('utf-8', errors='replace')[-15000:]}\n")


def run(part: str, args: argparse.Namespace, row: Row) -> list[BaseException]:
    size = proof.Size(prompts=args.prompts)
    if args.small:
        size = proof.Size(classes=2, batch=2, steps=4, prompts=2, probed=(0, 1, 3))
    if part == "modes":
        return modes.compare(args.work, row, args.modes, args.small, args.jobs)
    if part == "timing":
        return timing.measure(args.work, row, args.small)
    if part == "proof":
        return [
            error
            for precision in args.precision
            for error in proof.prove(args.work, row, precision, args.formats, args.servers, size, args.methods)
        ]
    if part == "curve":
        counts, steps = ((1, 2), (1,)) if args.small else (CURVE, CURVE_STEPS)
        return proof.curve(args.work, row, CURVE_FORMATS[: 2 if args.small else 4], size, counts, steps)
    return proof.floor(args.work, row, size)


if __name__ == "__main__":
    sys.exit(main())
