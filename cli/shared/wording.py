"""The engine's errors in the words of the command line: which flag allows what, and equal problems as one line.

The engine is called from ComfyUI too and knows no flags, so its messages say "allow overwriting". A phrase is replaced
only where the command at hand has the flag.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...quant_core.errors import PlanError, QuantPressError, RequestError
from .groups import collapse_sentences

# (the flag's name in the parsed arguments, what the engine says, what is said here)
PHRASES = (
    ("overwrite", "or allow overwriting", "or replace it with --overwrite"),
    ("skip_unmatched", "or allow that unmatched layers are skipped", "or leave such layers out with --skip-unmatched"),
    ("force", "force writes it all the same", "--force writes it all the same"),
    ("force", "Keep the key, or force it", "Keep the key, or use --force"),
    ("force", "Force it, if they are meant to differ", "Use --force, if they are meant to differ"),
    ("prefix", "Give the prefix of its diffusion model", "Give the prefix of its diffusion model with --prefix"),
    ("max_gb", "Allow larger shards", "Allow larger shards with --max-gb"),
    ("only", "or name the layers in only", "or name the layers with --only"),
    ("residual_lora", "the low-rank part needs", "--residual-lora needs"),
    ("scales", "there is no scales method", "--scales: there is no method"),
    ("rounding", "there is no rounding method", "--rounding: there is no method"),
    ("add_config", "--add ", "--add-config "),
    ("option", "there is no option ", "--option: there is no setting "),
)
# The same for what a regular expression finds.
PATTERNS = (
    ("keep", re.compile(r"^(keep|only|rule) (?=['\"])", re.M), r"--\1 "),
    ("option", re.compile(r"^option (?=\w+: found)", re.M), "--option "),
    ("group_size", re.compile(r"group_size (?=\d+ is not offered)"), "--group-size "),
    ("rotation", re.compile(r"rotation (?=\d+ is not offered)"), "--rotation "),
)
_NO_FORCE = "; force writes it all the same"


def message(err: QuantPressError, args: argparse.Namespace) -> str:
    """What is printed for an error of a command that was called with `args`."""
    say = _in_flags(args)
    if not isinstance(err, PlanError):
        return say(str(err))
    problems = collapse_sentences(map(say, err.problems))
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)])


@contextmanager
def named_flag(flag: str) -> Iterator[None]:
    """A RequestError of this block names the flag that brought it about."""
    try:
        yield
    except RequestError as err:
        raise RequestError(f"{flag}: {err}") from err


def _in_flags(args: argparse.Namespace) -> Callable[[str], str]:
    def say(text: str) -> str:
        for flag, phrase, words in PHRASES:
            if flag in args:
                text = text.replace(phrase, words)
        for flag, pattern, words in PATTERNS:
            if flag in args:
                text = pattern.sub(words, text)
        return text if "force" in args else text.replace(_NO_FORCE, "")

    return say
