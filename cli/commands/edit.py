"""`quantpress edit`: keys of the layers' comfy_quant metadata, added or removed; tensors and header together."""

from __future__ import annotations

import argparse

from ..shared import rewriting


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "edit",
        help="change the metadata of quantized layers",
        description="Add keys to, or remove keys from, what a file says of its quantized layers, in the "
        "comfy_quant tensors and in the header alike. Weights stay byte for byte.",
        epilog=rewriting.EXIT_CODES,
    )
    rewriting.add_arguments(parser)
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="PAIRS",
        help="a JSON object, or pairs like \"'full_precision_matrix_mult': true\"; may be repeated",
    )
    parser.add_argument(
        "--remove", action="append", default=[], metavar="KEYS", help="comma-separated; may be repeated"
    )
    parser.add_argument("--layers", metavar="REGEX", help="only layers whose name matches (default: all)")
    parser.add_argument(
        "--header",
        choices=("keep", "build", "drop"),
        default="keep",
        help="keep: update the header where it has the layers; build: write it from the tensors (and tensors "
        "that only the header describes); drop: remove it (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="write even what no loader could read any more")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.tools.configs import HeaderMode
    from ...quant_core.tools.edit import Edit, edit, parse_names, parse_pairs

    add: dict = {}
    for text in args.add:
        add |= parse_pairs(text)
    remove = [name for text in args.remove for name in parse_names(text)]
    if not add and not remove and args.header == "keep":
        args.parser.error("nothing to do: give --add, --remove, or --header build or drop")
    change = Edit(add, remove, args.layers, HeaderMode[args.header.upper()], args.force)
    with open_source(args.input) as src:
        return rewriting.finish(
            edit(src, change),
            args,
            "editing",
            force=args.force,
            nothing="the chosen layers say so already, so there is nothing to change. Use it as it is.",
        )
