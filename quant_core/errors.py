"""The one exception tree of the pack: catch QuantPressError to catch what the pack itself raises.

A message says which file or tensor, what was found, what is needed, and what to do. Mistakes in OUR code (a format
registered twice, a closed file used again) stay ValueError and the like: no user can act on them.

The command line and the nodes call a setting by other names. So a message never names a flag or an input of a node.
The error carries the setting it is about, and what to do with it; whoever shows the error says that in its own words.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class Remedy(Enum):
    """What the user can do with the setting that an error names.

    The value is how the engine says it, where no front end has words of its own: see Problem.worded.
    """

    CORRECT = "{}"  # the value itself is wrong: the text is about it, and begins with the setting's name
    REPLACE = "or allow overwriting."
    FORCE = "{} writes it all the same."
    DIFFER = "Force it, if they are meant to differ."
    LEAVE_OUT = "or allow that unmatched layers are skipped."
    KEEP = "or keep the layer as it is."
    NAME_LAYERS = "or name the layers in {}."
    PREFIX = "or give the prefix of its diffusion model."
    RAISE = "Allow larger shards."
    WRITE = "Write input scales."
    WIDER = "Use bf16, or fp32."
    SAY_FORMAT = "Say which one to `quantpress repair`, or to the node Repair."
    SAY_SCALE = (
        "If they multiply, say their name to `quantpress migrate`, or to the node Migrate Legacy File; else take the "
        "16-bit model."
    )


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. text: complete sentences.

    With the remedy CORRECT the text follows the setting's name: "'(' is not a regular expression.", or ": there is no
    method 'up'."
    setting: the field or parameter of the engine that it is about; None for no setting.
    """

    text: str
    setting: str | None = None
    remedy: Remedy = Remedy.CORRECT

    def __str__(self) -> str:
        """The message in the engine's words: the setting is called as its field."""
        return self.worded(self.setting, {remedy: remedy.value for remedy in Remedy})

    def worded(self, name: str | None, words: Mapping[Remedy, str]) -> str:
        """The message in the words of a front end.

        name: what the setting is called there; None where it has no such setting. words: for every remedy but
        CORRECT a clause that goes on ("or use {}.") or a sentence ("Use {}."), with {} for the name.
        """
        if self.setting is None:
            return self.text
        if self.remedy is Remedy.CORRECT:
            return f"{name or self.setting}{'' if self.text.startswith(':') else ' '}{self.text}"
        if name is None:
            return self.text
        clause = words[self.remedy].format(name)
        return f"{self.text.removesuffix('.')}, {clause}" if clause.startswith("or ") else f"{self.text} {clause}"


class QuantPressError(Exception):
    """Root of the tree. Raise one of the classes below, never this one.

    text, setting, remedy: as in Problem. problems: all that is wrong, which is one but for a PlanError.
    """

    problems: tuple[Problem, ...]

    def __init__(self, text: str, setting: str | None = None, remedy: Remedy = Remedy.CORRECT) -> None:
        self.problems = (Problem(text, setting, remedy),)
        super().__init__(text, setting, remedy)  # args stay what __init__ takes, so that pickling works

    def __str__(self) -> str:
        return listed([str(problem) for problem in self.problems])


class InputFileError(QuantPressError):
    """A file to read is missing, damaged, of another kind, or changed while it was being read."""


class RequestError(QuantPressError):
    """The request is wrong, whatever the disk holds: an option, a regex, a name, a shape that a format cannot take."""


class PlanError(RequestError):
    """Everything that is wrong with a plan, collected and raised once, so that one run shows all there is to fix.

    problems: in the order found; at least one. `str()` prints them all.
    """

    def __init__(self, problems: Sequence[str | Problem]) -> None:
        if isinstance(problems, str) or not problems:
            raise ValueError("PlanError takes a non-empty sequence of problems")
        super().__init__("")
        self.problems = tuple(Problem(one) if isinstance(one, str) else one for one in problems)
        self.args = (self.problems,)


class OutputError(QuantPressError):
    """The output cannot be written: the target exists, its folder is missing or read-only, the disk is full."""


class VerificationError(QuantPressError):
    """What was written, read back, is not what was planned or is worse than the recipe allows."""


class Cancelled(QuantPressError):
    """The user stopped the run. Nothing was left behind; not a failure."""


def listed(problems: Sequence[str]) -> str:
    """One problem as it is, several as a list under their number."""
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)])


def some_of(names: Sequence[str], separator: str = ", ", shown: int = 8) -> str:
    """The first few of a list that may be thousands long, and how many more there are: for error messages."""
    more = [f"and {len(names) - shown} more"] if len(names) > shown else []
    return separator.join([*names[:shown], *more])


def counted(count: int, one: str, many: str | None = None) -> str:
    """ "1 layer", "3 layers"; with a verb, counted(n, "layer is", "layers are")."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean x?" for a name that is nearly a known one, else nothing. For the middle of a message."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    return f" Did you mean {near[0]}?" if near else ""
