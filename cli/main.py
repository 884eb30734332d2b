"""`quantpress`: the parser, the exit codes, and the one place where an error becomes a message.

Exit codes: 0 done, 1 the input or the request is wrong, 2 usage, 130 interrupted. Nothing heavy is imported before a
command runs, so that --help is fast.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..quant_core._version import __version__
from ..quant_core.errors import Cancelled, QuantPressError
from . import compat
from .commands import (
    bitsandbytes,
    calibrate,
    calibration,
    demo,
    dequantize,
    edit,
    formats,
    inspect,
    merge,
    migrate,
    quantize,
    repair,
    template,
    verify,
)
from .shared.interrupt import INTERRUPTED, signals_interrupt
from .shared.wording import message

COMMANDS = (
    quantize,
    inspect,
    verify,
    dequantize,
    formats,
    template,
    migrate,
    repair,
    edit,
    merge,
    bitsandbytes,
    calibrate,
    calibration,
    compat,
    demo,
)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line.

    Every sub-parser sets `run`, a function of the parsed arguments that returns the exit code.
    """
    parser = argparse.ArgumentParser(
        prog="quantpress",
        description="Quantize diffusion models for ComfyUI.",
        epilog="Exit codes: 0 done, 1 the input or the request is wrong, 2 usage, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"quantpress {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Wrong usage leaves by SystemExit(2), as argparse does it."""
    args = build_parser().parse_args(argv)
    try:
        with signals_interrupt():
            code = args.run(args)
            sys.stdout.flush()
            return code
    except Cancelled:
        return _stop(INTERRUPTED, "interrupted; nothing was left behind")
    except KeyboardInterrupt:
        return _stop(INTERRUPTED, "interrupted")
    except QuantPressError as err:
        return _stop(1, f"error: {message(err, args)}")
    except BrokenPipeError:  # `quantpress formats | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _stop(code: int, message: str) -> int:
    print(f"quantpress: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
