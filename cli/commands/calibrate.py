"""`quantpress calibrate`: input scales into a file that is quantized already, its weights untouched."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...quant_core.errors import RequestError, counted
from ..shared.console import print_json
from ..shared.interrupt import stop_on_signal
from ..shared.progress import show_progress

if TYPE_CHECKING:
    from ...quant_core.checkpoint.source import Source


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="write input scales into a quantized file",
        description="Add or replace input_scale in FP8 and NVFP4 layers; every other tensor keeps its "
        "bytes. A captured calibration is the best source; the others are guesses.",
    )
    parser.add_argument("input", metavar="FILE", type=Path, help="the quantized model")
    parser.add_argument("output", metavar="OUT", type=Path, help="the new file")
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--from", dest="calibration", type=Path, metavar="CALIBRATION", help="captured in ComfyUI")
    sources.add_argument(
        "--lora",
        type=Path,
        metavar="FILE",
        help="a LoRA of this model: its directions as inputs, and random ones for the layers that it leaves alone",
    )
    sources.add_argument(
        "--input-scales",
        type=Path,
        metavar="FILE",
        help="JSON {layer: value}, or another quantized model with input scales",
    )
    sources.add_argument("--simulate", action="store_true", help="random inputs through each layer")
    sources.add_argument(
        "--weight-scales",
        action="store_true",
        help="input_scale = weight_scale, as some text encoder files have it (FP8)",
    )
    parser.add_argument(
        "--samples", type=int, default=64, metavar="N", help="random rows per layer (default: %(default)s)"
    )
    parser.add_argument(
        "--percentile",
        type=float,
        metavar="P",
        help="of the magnitudes; 100 is the largest (default: 100 with --from, 99.9 for guesses)",
    )
    parser.add_argument(
        "--seed", type=int, default=42, metavar="N", help="of the random inputs (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the scales and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print the scales and what became of them as JSON")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    from ...quant_core.cancel import cancel_scope
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.tools.input_scales import patch_input_scales, plan_patch

    with stop_on_signal() as cancel, cancel_scope(cancel), open_source(args.input) as source:
        scales, method = _scales(args, source)
        if not scales:
            from ...quant_core.tools.contents import describe

            raise RequestError(
                f"{args.input}: no layer of it can have an input scale, which FP8 per tensor and NVFP4 use; "
                f"{describe(source)}. Nothing was written."
            )
        if args.dry_run:
            _, report = plan_patch(source, scales, method)
        else:
            reads = [path for path in (args.calibration, args.input_scales, args.lora) if path is not None]
            options = {"method": method, "overwrite": args.overwrite, "reads": reads}
            with show_progress("writing") as progress:
                report = patch_input_scales(
                    args.input, args.output, scales, **options, progress=progress, cancel=cancel
                )
    if args.json:
        print_json(
            {
                "source": str(args.input),
                "target": None if args.dry_run else str(args.output),
                "method": method,
                "scales": scales,
                "added": list(report.added),
                "changed": list(report.changed),
                "kept": list(report.kept),
                "skipped": dict(report.skipped),
                "notes": list(report.notes),
            }
        )
        return 0
    what = "would be written" if args.dry_run else "written and verified"
    print(
        f"{args.output}: {what}; input scales from {method}: {len(report.added)} added, "
        f"{len(report.changed)} changed, {len(report.kept)} as they were, {len(report.skipped)} skipped"
    )
    for line in (*(f"skipped {name}: {why}" for name, why in list(report.skipped.items())[:10]), *report.notes):
        print(f"  {line}")
    return 0


def _scales(args: argparse.Namespace, source: Source) -> tuple[dict[str, float], str]:
    """({layer: input_scale}, where they are from)."""
    from ...quant_core.input_scales.rule import read_input_scales, scales_from_weight_scales
    from ...quant_core.input_scales.sources import captured_scales, simulated_scales
    from ...quant_core.input_scales.synthesise import SimulationSettings
    from ...quant_core.stored.layers import stored_layers

    if args.calibration is not None:
        percent = 100.0 if args.percentile is None else args.percentile
        return captured_scales(
            source, args.calibration, percent
        ), f"calibration {args.calibration.name}, percentile {percent:g}"
    if args.input_scales is not None:
        return read_input_scales(args.input_scales), f"file {args.input_scales.name}"
    if args.weight_scales:
        return scales_from_weight_scales(source, stored_layers(source)), "the weight scales"
    settings = SimulationSettings(args.samples, 99.9 if args.percentile is None else args.percentile, args.seed)
    scales, informed = simulated_scales(source, settings, args.lora)
    if args.lora is None:
        return scales, f"{settings.samples} random inputs, percentile {settings.percentile:g}"
    return (
        scales,
        f"LoRA {args.lora.name} for {counted(informed, 'layer')}, random inputs for {len(scales) - informed}",
    )
