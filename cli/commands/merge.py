"""`quantpress merge`: the diffusion model out of a checkpoint and back, shards and one file, LoRAs baked in."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...quant_core.errors import counted
from ..shared import rewriting
from ..shared.interrupt import stop_on_signal
from ..shared.progress import show_progress

_GB = 10**9


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "merge",
        help="put files together and take them apart; bake LoRAs in",
        description="Every tensor that is not named is copied byte for byte.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_lora(actions)
    extract = actions.add_parser("extract", help="the diffusion model out of a full checkpoint")
    rewriting.add_arguments(extract)
    extract.add_argument(
        "--prefix", help="what the names of its tensors begin with, with the last dot (default: as found)"
    )
    extract.set_defaults(run=_extract)
    insert = actions.add_parser("insert", help="another diffusion model into a full checkpoint")
    insert.add_argument("input", metavar="CHECKPOINT", type=Path)
    insert.add_argument("model", metavar="MODEL", type=Path)
    insert.add_argument("output", metavar="OUTPUT", type=Path, nargs="?")
    rewriting.add_common(insert)
    insert.add_argument("--prefix", help="what the names of the tensors replaced begin with (default: as found)")
    insert.add_argument("--force", action="store_true", help="even if the two differ in their weights' names")
    insert.set_defaults(run=_insert)
    join = actions.add_parser(
        "join", help="shards as one file", description="INPUT: the *.safetensors.index.json or its folder."
    )
    rewriting.add_arguments(join)
    join.set_defaults(run=_join)
    split = actions.add_parser("split", help="one file as shards with an index")
    split.add_argument("input", metavar="INPUT", type=Path)
    split.add_argument(
        "output", metavar="INDEX", type=Path, help="the index, *.safetensors.index.json; shards lie beside it"
    )
    split.add_argument("--max-gb", type=float, default=5.0, metavar="GB", help="data per shard (default: %(default)s)")
    split.add_argument("--overwrite", action="store_true", help="replace INDEX and its shards if they exist")
    split.set_defaults(run=_split)


def _add_lora(actions: argparse._SubParsersAction) -> None:
    lora = actions.add_parser(
        "lora",
        help="LoRAs into the weights of a 16-bit model",
        description="Baking before quantizing rounds once. A LoRA applied to quantized weights rounds "
        "twice, and measured up to 3 dB worse (bench/speed/lora_bake.py).",
    )
    rewriting.add_arguments(lora)
    lora.add_argument(
        "--lora",
        action="append",
        required=True,
        metavar="FILE[:STRENGTH]",
        help="what ComfyUI can load for the model: LoRA, DoRA, LoHa, LoKr, GLoRA, OFT, differences; strength 1 if not "
        "given; may be repeated",
    )
    lora.add_argument("--skip-unmatched", action="store_true", help="leave out a LoRA's layers that the model has not")
    lora.set_defaults(run=_lora)


def _lora(args: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.tools.contents import require_model
    from ...quant_core.tools.lora import bake

    with ExitStack() as stack:
        src = stack.enter_context(open_source(args.input))
        require_model(src)
        loras = [(stack.enter_context(open_source(path)), strength) for path, strength in map(parse_lora, args.lora)]
        rewrite = bake(src, loras, skip_unmatched=args.skip_unmatched)
        return rewriting.finish(rewrite, args, "baking", reads=[file for lora, _ in loras for file in lora.files])


def parse_lora(text: str) -> tuple[Path, float]:
    """ "style.safetensors:0.8" -> its path and strength. A colon without a number behind it belongs to the path."""
    path, _, strength = text.rpartition(":")
    try:
        return (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _extract(args: argparse.Namespace) -> int:
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.tools.merge import extract

    with open_source(args.input) as src:
        return rewriting.finish(extract(src, args.prefix), args, "extracting")


def _insert(args: argparse.Namespace) -> int:
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.tools.merge import insert

    with open_source(args.input) as src, open_source(args.model) as model:
        return rewriting.finish(insert(src, model, args.prefix, force=args.force), args, "inserting")


def _join(args: argparse.Namespace) -> int:
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.tools.merge import join

    with open_source(args.input) as src:
        return rewriting.finish(join(src), args, "joining")


def _split(args: argparse.Namespace) -> int:
    from ...quant_core.checkpoint.source import open_source
    from ...quant_core.tools.merge import split

    with open_source(args.input) as src, stop_on_signal() as cancel, show_progress("splitting") as progress:
        shards = split(
            src, args.output, int(args.max_gb * _GB), overwrite=args.overwrite, progress=progress, cancel=cancel
        )
    print(f"{args.output}: {counted(len(shards), 'shard')}, written and verified")
    return 0
