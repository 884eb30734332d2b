"""`quantpress migrate`: older and foreign forms into ComfyUI's own, or back into the legacy one."""

from __future__ import annotations

import argparse

from ..shared import rewriting


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "migrate",
        help="turn older and foreign quantized files into ComfyUI's form",
        description="Legacy fp8_scaled and INT8, bitsandbytes, ModelOpt and transformers exports, older "
        "comfy forms and files without metadata -> comfy_quant. Nothing is requantized: "
        "the weights decode to the same values.",
        epilog=rewriting.EXIT_CODES,
    )
    rewriting.add_arguments(parser)
    parser.add_argument(
        "--to",
        choices=("comfy_quant", "legacy"),
        default="comfy_quant",
        help="legacy: fp8_scaled, for loaders that know only that (default: %(default)s)",
    )
    parser.add_argument(
        "--hp-filter", metavar="REGEX", help="weights that must be in high precision; it is an error if not"
    )
    parser.add_argument(
        "--full-precision-mm",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="set full_precision_matrix_mult in every FP8 layer, or remove it (default: keep it, and take it "
        "from a legacy marker of two elements)",
    )
    parser.add_argument(
        "--input-scale",
        choices=("keep", "unit", "weight"),
        default="keep",
        help="FP8 layers without an input_scale get none, 1.0, or the weight's scale (default: %(default)s)",
    )
    parser.add_argument(
        "--scale-name",
        metavar="END",
        help="how the names of the scales end that another program wrote, where that is not certain: scale for "
        "LAYER.scale; they are taken to multiply the codes",
    )
    parser.add_argument(
        "--no-header", dest="header", action="store_false", help="write no metadata into the file's header"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.tools.canonicalize import InputScale
    from ...quant_core.tools.contents import nothing_to_migrate
    from ...quant_core.tools.migrate import MigrateOptions, migrate
    from ...quant_core.tools.to_legacy import to_legacy

    with open_source(args.input) as src:
        if args.to == "legacy":
            rewrite = to_legacy(src, scale_input=args.input_scale == "unit")
        else:
            options = MigrateOptions(
                args.hp_filter, args.full_precision_mm, InputScale(args.input_scale), args.header, args.scale_name
            )
            rewrite = migrate(src, options)
        nothing = "" if rewrite.changes() else nothing_to_migrate(src)
        return rewriting.finish(rewrite, args, "migrating", nothing=nothing)
