"""The one exception tree of the pack: catch QuantPressError to catch what the pack itself raises.

A message says which file or tensor, what was found, what is needed, and what to do. Mistakes in OUR code (a format
registered twice, a closed file used again) stay ValueError and the like: no user can act on them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class QuantPressError(Exception):
    """Root of the tree. Raise one of the classes below, never this one."""


class InputFileError(QuantPressError):
    """A file to read is missing, damaged, of another kind, or changed while it was being read."""


class RequestError(QuantPressError):
    """The request is wrong, whatever the disk holds: an option, a regex, a name, a shape that a format cannot take."""


class PlanError(RequestError):
    """Everything that is wrong with a plan, collected and raised once, so that one run shows all there is to fix.

    problems: complete sentences, in the order found; at least one. `str()` prints them all.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        if isinstance(problems, str) or not problems:
            raise ValueError("PlanError takes a non-empty sequence of problems")
        self.problems = tuple(problems)
        super().__init__(self.problems)  # args stay what __init__ takes, so that pickling works

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n".join([f"{len(self.problems)} problems:", *(f"  - {problem}" for problem in self.problems)])


class OutputError(QuantPressError):
    """The output cannot be written: the target exists, its folder is missing or read-only, the disk is full."""


class VerificationError(QuantPressError):
    """What was written, read back, is not what was planned or is worse than the recipe allows."""


class Cancelled(QuantPressError):
    """The user stopped the run. Nothing was left behind; not a failure."""


def some_of(names: Sequence[str], separator: str = ", ", shown: int = 8) -> str:
    """The first few of a list that may be thousands long, and how many more there are: for error messages."""
    more = [f"and {len(names) - shown} more"] if len(names) > shown else []
    return separator.join([*names[:shown], *more])


def counted(count: int, one: str, many: str | None = None) -> str:
    """ "1 layer", "3 layers"; with a verb, counted(n, "layer is", "layers are")."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean x?" for a name that is nearly one of the known ones, else nothing; for the middle of a message."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    return f" Did you mean {near[0]}?" if near else ""
