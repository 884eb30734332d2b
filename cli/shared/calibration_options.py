"""Options of `quantize` that bring in a calibration, and what it is used for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...quant_core.calibration.use import CalibrationUse

DEFAULT_RANK = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="what flows into the layers, captured in ComfyUI; scales and rounding are `auto` then, unless given",
    )
    parser.add_argument(
        "--bias-correction",
        action="store_true",
        help="with --calibration: move the mean error of a layer's output into its bias, where that helps",
    )
    parser.add_argument(
        "--write-input-scales",
        action="store_true",
        help="with --calibration: write input_scale, from the true absmax, in formats whose runtime uses it. "
        "FP8 without one saturates inputs above 448; NVFP4 without one measures every call",
    )
    parser.add_argument(
        "--residual-lora",
        type=Path,
        metavar="FILE",
        help="also write what quantizing lost as a low-rank LoRA, for ComfyUI's Load LoRA (Bypass, Model Only); "
        "the usual Load LoRA rounds it away and makes the model worse (docs/loras.md)",
    )
    parser.add_argument("--residual-rank", type=int, metavar="N", help=f"its rank (default: {DEFAULT_RANK})")


def read(args: argparse.Namespace) -> CalibrationUse | None:
    """The calibration and what it is for; usage errors for options that need one."""
    from ...quant_core.calibration.use import CalibrationUse

    if args.calibration is None:
        for name in ("bias_correction", "write_input_scales"):
            if getattr(args, name):
                args.parser.error(f"--{name.replace('_', '-')} needs --calibration")
        return None
    return CalibrationUse(args.calibration, args.bias_correction, args.write_input_scales)


def methods(args: argparse.Namespace) -> tuple[str, str]:
    """(scales, rounding): as given, else `auto` with a calibration and the plain ones without."""
    scales, rounding = ("absmax", "nearest") if args.calibration is None else ("auto", "auto")
    return args.scales or scales, args.rounding or rounding


def residual(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's options for the low-rank part."""
    if args.residual_rank is not None and args.residual_lora is None:
        args.parser.error("--residual-rank needs --residual-lora")
    return (
        {}
        if args.residual_lora is None
        else {"residual_rank": DEFAULT_RANK if args.residual_rank is None else args.residual_rank}
    )
