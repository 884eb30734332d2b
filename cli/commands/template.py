"""`quantpress template`: a template of the file that gives single layers their own format."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...quant_core.checkpoint.same_file import require_not_source


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "template",
        help="write a template for formats by layer",
        description="List every linear layer of a model in a JSON file, to be filled in and given to "
        "`quantpress quantize --layer-config`. Keys are regular expressions, so that many "
        "entries can become one.",
    )
    parser.add_argument("input", metavar="INPUT", type=Path)
    parser.add_argument("output", metavar="OUTPUT.json", type=Path)
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.errors import OutputError, RequestError, counted
    from ...quant_core.policy.layer_config import template
    from ...quant_core.tools.contents import require_model

    with open_source(args.input) as src:
        require_model(src)
        layers = {
            name.removesuffix(".weight"): info.shape
            for name, info in src.tensors.items()
            if name.endswith(".weight") and len(info.shape) == 2
        }
        if not layers:
            raise RequestError(
                f"{args.input}: it has no linear weight, so there is nothing to fill in. Give a diffusion model or a "
                "text encoder."
            )
        text = template(layers)
    require_not_source(args.output, [src.path, *src.files])
    try:
        with open(args.output, "w" if args.overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as err:
        raise OutputError(
            f"{args.output}: the target exists. Choose another name, or replace it with --overwrite."
        ) from err
    except OSError as err:
        raise OutputError(
            f"{args.output}: the file cannot be written: {err.strerror}. Correct the path, or choose another folder."
        ) from err
    print(f'{args.output}: {counted(len(layers), "layer")}. Fill in every `format`, or set "skip": true.')
    return 0
