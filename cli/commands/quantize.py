"""`quantpress quantize`: one file in, one verified file out; or, with --dry-run, the plan."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...quant_core.errors import counted
from ..shared import calibration_options, recipe_options
from ..shared.console import duration_text, print_json, size_text
from ..shared.interrupt import stop_on_signal
from ..shared.progress import show_progress
from ..shared.wording import in_flags, named_flag

if TYPE_CHECKING:
    from ...quant_core.pipeline.report import LayerReport, RunReport
    from ...quant_core.pipeline.request import Request


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "quantize",
        help="quantize a model into a new file",
        description="Quantize the linear layers of a safetensors model into a new file. The input "
        "stays as it is; the output appears only when it is complete and verified.",
    )
    parser.add_argument(
        "input",
        metavar="INPUT",
        type=Path,
        help="a .safetensors file, a *.safetensors.index.json, or a folder with one of them",
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the new file, *.safetensors")
    _add_layers(parser)
    calibration_options.add_arguments(parser)
    recipe_options.add_arguments(parser)
    _add_outcome(parser)
    parser.set_defaults(run=run, parser=parser)


def _add_layers(parser: argparse.ArgumentParser) -> None:
    """Which layers become what."""
    parser.add_argument("--format", required=True, metavar="NAME", help="see `quantpress formats`")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="weights per scale, for formats that offer a choice"
    )
    parser.add_argument("--rotation", type=int, metavar="N", help="rotation group, for the rotated formats")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="REGEX",
        help="keep layers whose name matches in their dtype; may be repeated",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="REGEX",
        help="quantize only layers whose name matches, sensitive ones too; may be repeated",
    )
    parser.add_argument("--fallback", metavar="FORMAT", help="the format for layers whose shape NAME cannot take")
    parser.add_argument(
        "--scales", metavar="NAME", help="how scales are chosen (default: absmax; auto with --calibration)"
    )
    parser.add_argument(
        "--rounding", metavar="NAME", help="how weights are rounded (default: nearest; auto with --calibration)"
    )


def _add_outcome(parser: argparse.ArgumentParser) -> None:
    """Where it is computed, and what comes out."""
    parser.add_argument(
        "--device", default="auto", metavar="auto|cpu|cuda", help="where to compute (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="for methods that use chance (default: 0)")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="also write the report of every layer here")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT, and the report, if they exist")
    parser.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="keep layers that hold NaN or Inf in their dtype; by default they are an error",
    )
    parser.add_argument(
        "--other-runtime",
        action="store_true",
        help="also quantize a model that ComfyUI does not run quantized, or would not find: for another program",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report, or the plan, as JSON (see docs/json.md)"
    )


def run(args: argparse.Namespace) -> int:
    if args.dry_run and args.report:
        args.parser.error("--report needs a conversion; a dry run has its plan with --json")
    request = _request(args)
    if args.dry_run:
        _dry_run(request, args.json)
        return 0
    if args.report:
        _check_report(args.report, request)
    report = _convert(request)
    if args.report:
        from ..shared.report_file import write_report

        write_report(args.report, report.to_json())
    if args.json:
        print_json(report.to_json())
    else:
        _print_report(report, args)
        if request.residual_lora is not None:
            from ...quant_core.algorithms.residual import HOW_TO_LOAD

            print(f"{request.residual_lora}: {HOW_TO_LOAD}")
    return 0


def _request(args: argparse.Namespace) -> Request:
    """What the flags ask for. Raises QuantPressError; SystemExit(2) for flags that need another one."""
    from ...quant_core.formats import get_format
    from ...quant_core.pipeline.request import Request
    from ...quant_core.policy.general import Policy
    from ...quant_core.policy.recipe import parse_recipe

    scales, rounding = calibration_options.methods(args)
    with named_flag("--format"):
        fmt = get_format(args.format)
    fmt = fmt.with_options(args.group_size, args.rotation)
    options = {**calibration_options.residual(args), **recipe_options.parse_options(args.option)}
    recipe = parse_recipe(fmt, scales, rounding, args.seed, options)
    with named_flag("--fallback"):
        fallback = parse_recipe(get_format(args.fallback), scales, rounding, args.seed) if args.fallback else None
    recipe, policy = recipe_options.apply(args, recipe, Policy(tuple(args.keep), tuple(args.only), fallback))
    return Request(
        args.input,
        args.output,
        recipe,
        policy,
        device=args.device,
        calibration=calibration_options.read(args),
        residual_lora=args.residual_lora,
        overwrite=args.overwrite,
        allow_nonfinite=args.allow_nonfinite,
        other_runtime=args.other_runtime,
    )


def _dry_run(request: Request, as_json: bool) -> None:
    from contextlib import ExitStack

    from ...quant_core.calibration.use import open_use
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.pipeline.plan import make_plan
    from ..shared.plan_view import plan_json, plan_lines

    with ExitStack() as stack:
        src = stack.enter_context(open_source(request.source))
        known = None if request.calibration is None else stack.enter_context(open_use(request.calibration))
        plan = make_plan(src, request, known)
    if as_json:
        print_json(plan_json(plan, request))
        return
    print("\n".join(plan_lines(plan, request)))
    if request.target.exists() and not request.overwrite:
        print(f"{request.target} exists; the conversion will need --overwrite.")


def _convert(request: Request) -> RunReport:
    import torch

    from ...quant_core.errors import RequestError
    from ...quant_core.pipeline.run import convert
    from ..shared.heap import give_freed_weights_back

    give_freed_weights_back()
    try:
        with stop_on_signal() as cancel, show_progress("quantizing") as progress:
            return convert(request, progress=progress, cancel=cancel)
    except torch.OutOfMemoryError as err:
        raise RequestError(
            f"--device {request.device}: the GPU's memory is too small for a layer, or taken by something "
            "else. Free it, or use --device cpu. Nothing was written."
        ) from err


def _check_report(report: Path, request: Request) -> None:
    from ...quant_core.checkpoint.source import open_source
    from ..shared.report_file import check_report_path

    with open_source(request.source) as src:
        check_report_path(report, request.target, (src.path, *src.files), request.overwrite)


def _print_report(report: RunReport, args: argparse.Namespace) -> None:
    from ...quant_core.pipeline.report import against_nearest

    for warning in report.warnings:
        print(f"quantpress: warning: {in_flags(warning, args)}", file=sys.stderr)
    layers = report.quantized
    share = report.output_bytes / report.source_bytes
    print(
        f"{report.target}: {counted(len(layers), 'layer')} quantized to {report.recipe['format']}, "
        f"{len(report.layers) - len(layers)} kept"
    )
    print(
        f"  size    {size_text(report.source_bytes)} -> {size_text(report.output_bytes)} ({share:.0%}), "
        f"{report.bits_per_weight:.2f} bits per quantized weight"
    )
    print(f"  error   {report.weight_error:.4f} relative, over all quantized weights")
    for line in against_nearest(layer.to_json() for layer in layers):
        print(f"          {line}")
    if any(layer.rows for layer in layers):
        print(f"  data    {_used(layers)}")
    print(
        f"  time    {duration_text(report.seconds)} on {report.device}, "
        f"{size_text(report.source_bytes / max(report.seconds, 1e-9))}/s; written and verified"
    )


def _used(layers: Sequence[LayerReport]) -> str:
    """What the calibration did, counted over the layers."""
    methods = Counter(f"{layer.judgement.scales} + {layer.judgement.rounding}" for layer in layers if layer.judgement)
    parts = [f"{count}x {method}" for method, count in methods.most_common()]
    fell_back = sum(layer.judgement is not None and layer.judgement.fell_back for layer in layers)
    parts += [f"{fell_back} fell back to round-to-nearest"] if fell_back else []
    biases = [layer.bias_corrected for layer in layers if layer.bias_corrected is not None]
    parts += [f"{sum(biases)} of {counted(len(biases), 'bias', 'biases')} corrected"] if biases else []
    scales = sum(layer.input_scale is not None for layer in layers)
    parts += [counted(scales, "input scale")] if scales else []
    return ", ".join(parts)
