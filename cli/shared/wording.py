"""The engine's errors in the words of the command line: which flag is meant, and equal problems as one line.

The engine names a setting by its field, as ComfyUI's nodes use it too. A flag is named only where the command at hand
has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from ...quant_core.errors import Problem, QuantPressError, Remedy, RequestError, listed
from .groups import collapse_sentences

# Settings of the engine whose flag has another name. The keys are fields of the engine, the values of the arguments.
FLAGS = {
    "rules": "rule",
    "options": "option",
    "config": "add_config",
    "input_scales": "write_input_scales",
    "max_bytes": "max_gb",
}
WORDS = {
    Remedy.REPLACE: "or replace it with {}.",
    Remedy.FORCE: "{} writes it all the same.",
    Remedy.DIFFER: "Use {}, if they are meant to differ.",
    Remedy.LEAVE_OUT: "or leave such layers out with {}.",
    Remedy.KEEP: "or keep the layer as it is: name it in --keep, or give {}.",
    Remedy.NAME_LAYERS: "or name the layers with {}.",
    Remedy.PREFIX: "or give the prefix of its diffusion model with {}.",
    Remedy.RAISE: "Allow larger shards with {}.",
    Remedy.WRITE: "Write input scales ({}).",
    Remedy.WIDER: "Use {} bf16, or fp32.",
    Remedy.SAY_FORMAT: "Say which one with {}, or find out with --against SOURCE instead.",
    Remedy.SAY_SCALE: "If they multiply, say how their names end with {}; else take the 16-bit model.",
}
# What one command alone takes: the others send the user there.
ELSEWHERE = {"assume": "`quantpress repair --assume`", "scale_name": "`quantpress migrate --scale-name`"}


def message(err: QuantPressError, args: argparse.Namespace) -> str:
    """What is printed for an error of a command that was called with `args`."""
    return listed(collapse_sentences(in_flags(problem, args) for problem in err.problems))


def in_flags(problem: Problem, args: argparse.Namespace) -> str:
    """One problem, as a command that was called with `args` says it."""
    return problem.worded(None if problem.setting is None else flag(problem.setting, args), WORDS)


def flag(setting: str, args: argparse.Namespace) -> str | None:
    """The flag of this setting of the engine; None where neither this command nor one that is named has it."""
    name = FLAGS.get(setting, setting)
    return f"--{name.replace('_', '-')}" if name in args else ELSEWHERE.get(setting)


@contextmanager
def named_flag(flag: str) -> Iterator[None]:
    """A RequestError of this block names the flag that brought it about."""
    try:
        yield
    except RequestError as err:
        raise RequestError(f"{flag}: {err}") from err
