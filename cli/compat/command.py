"""`quantpress compat`: the older tool's command line, run by ours."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ...quant_core.checkpoint.same_file import require_not_source
from ...quant_core.errors import InputFileError, OutputError
from .options import HELP_FLAGS, OPTIONS, SECTIONS, Option
from .translate import Translation, translate


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compat",
        help="take the options of convert_to_quant",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for section, flags in HELP_FLAGS.items():
        parser.add_argument(*flags, dest="help_section", action="store_const", const=section)
    for option in OPTIONS:
        _add(parser, option)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--print-only", action="store_true", help="print the commands and run nothing")
    parser.set_defaults(run=partial(run, commands), overwrite=False)


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    names = list(option.spellings)
    if option.kind is bool:
        parser.add_argument(*names, dest=option.dest, action="store_true")
    elif option.dest == "dry_run":
        parser.add_argument(*names, dest=option.dest, nargs="?", const="analyze", choices=option.choices)
    else:
        parser.add_argument(*names, dest=option.dest, type=option.kind, choices=option.choices or None)


def section_help(section: str) -> str:
    """One section as text, and where the others are."""
    lines = [f"quantpress compat: {SECTIONS[section]}", ""]
    if section == "standard":
        lines += [
            "Takes the options of convert_to_quant (- and _ are the same), runs the commands of ours that do it, and",
            "prints them. Options that have no effect are named.",
            "",
            "  --overwrite                          replace the output if it exists",
            "  --print-only                         print the commands and run nothing",
        ]
    for option in OPTIONS:
        if option.section == section:
            shown = ", ".join(option.names) + ("" if option.kind is bool else f" {option.kind.__name__.upper()}")
            text = f"(no effect) {option.idle}" if option.idle else option.help
            choices = f" [{', '.join(map(str, option.choices))}]" if option.choices else ""
            lines.append(f"  {shown:<36} {text}{choices}".rstrip())
    others = [f"{flags[0]} {SECTIONS[name].lower()}" for name, flags in HELP_FLAGS.items() if name != section]
    return "\n".join([*lines, "", "Other sections: " + "; ".join(others)])


def run(commands: argparse._SubParsersAction, args: argparse.Namespace) -> int:
    """Run the steps that do what the options ask for. commands: the sub-parsers of all commands, which run them."""
    if "help_section" in args:
        print(section_help(args.help_section))
        return 0
    known = {option.dest for option in OPTIONS} | {"overwrite"}
    options = {dest: value for dest, value in vars(args).items() if dest in known}
    layers, files = _read(options.get("input"))
    translation = translate(options, layers)
    for step in translation.steps:
        print(f"runs: quantpress {shlex.join(step)}")
    for note in translation.notes:
        print(f"note: {note}")
    sys.stdout.flush()
    return 0 if "print_only" in args else _run_steps(commands, translation, files)


def _run_steps(commands: argparse._SubParsersAction, translation: Translation, files: Sequence[Path]) -> int:
    if translation.scratch:
        _check_files(translation, files)
    try:
        for name, *rest in translation.steps:
            args = commands.choices[name].parse_args(rest)
            code = args.run(args)
            if code:
                return code
    finally:
        for path in translation.scratch:
            path.unlink(missing_ok=True)
    return 0


def _check_files(translation: Translation, sources: Sequence[Path]) -> None:
    """OutputError where steps through a scratch file would lose one of the user's: each step alone could not tell."""
    for scratch in translation.scratch:
        if os.path.lexists(scratch):
            raise OutputError(f"{scratch}: the file is needed between two steps, and exists. Rename or remove it.")
    require_not_source(Path(translation.steps[-1][2]), sources)


def _read(path: str | None) -> tuple[list[str], Sequence[Path]]:
    """Linear layers for the filters, and the files; none while no input is given (translate says so)."""
    if path is None:
        return [], ()
    if not Path(path).exists():
        raise InputFileError(f"{path}: the file cannot be read: there is no such file. Check --input.")
    from ...quant_core.checkpoint.source import open_source

    with open_source(path) as src:
        layers = [
            name.removesuffix(".weight")
            for name, info in src.tensors.items()
            if name.endswith(".weight") and len(info.shape) == 2
        ]
        return layers, (src.path, *src.files)
