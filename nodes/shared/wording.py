"""The engine's errors in the words of the nodes: which input is meant. Importing this needs no ComfyUI.

The engine names a setting by its field, as the command line uses it too. An input is named only where the node at hand
has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from typing import Any

from ...quant_core.errors import PlanError, Problem, QuantPressError, Remedy

# Settings of the engine whose input has another name, and the inputs that they may be.
INPUTS = {
    "rotation": ("group_size",),
    "rules": ("layer_config",),
    "max_bytes": ("max_gb",),
    "force": ("force", "allow_differences"),
    "allow_nonfinite": ("keep",),
}
WORDS = {
    Remedy.REPLACE: "or switch on {} to replace it.",
    Remedy.FORCE: "Switch on {} to write it all the same.",
    Remedy.DIFFER: "Switch on {}, if they are meant to differ.",
    Remedy.LEAVE_OUT: "or switch on {} to leave such layers out.",
    Remedy.KEEP: "or keep the layer as it is: name it in {}.",
    Remedy.NAME_LAYERS: "or name the layers in {}.",
    Remedy.PREFIX: "or write the prefix of its diffusion model into {}.",
    Remedy.RAISE: "Set {} higher.",
    Remedy.WRITE: "Switch on {}.",
    Remedy.WIDER: "Set {} to bf16, or fp32.",
    Remedy.SAY_FORMAT: "Say which one in {}, or connect the original there.",
    Remedy.SAY_SCALE: "If they multiply, write how their names end into {}; else take the 16-bit model.",
}
# What one node alone takes: the others send the user there.
ELSEWHERE = {"assume": "assume of the node Repair", "scale_name": "scale_name of the node Migrate Legacy File"}


def in_inputs(problem: Problem, inputs: Collection[str]) -> str:
    """One problem, as a node with these inputs says it."""
    return problem.worded(None if problem.setting is None else input_name(problem.setting, inputs), WORDS)


def input_name(setting: str, inputs: Collection[str]) -> str | None:
    """The input of this setting of the engine; None where neither this node nor one that is named has it."""
    here = (name for name in INPUTS.get(setting, (setting,)) if name in inputs)
    return next(here, ELSEWHERE.get(setting))


def names_its_inputs(node: Any) -> Any:
    """The class of a node, whose errors name its own inputs from now on."""
    execute: Callable[..., Any] = node.execute.__func__

    @wraps(execute)
    def told(cls: type, **values: Any) -> Any:
        try:
            return execute(cls, **values)
        except QuantPressError as err:
            if all(problem.setting is None for problem in err.problems):
                raise
            raise _retold(err, values) from err

    node.execute = classmethod(told)
    return node


def _retold(err: QuantPressError, inputs: Collection[str]) -> QuantPressError:
    texts = [in_inputs(problem, inputs) for problem in err.problems]
    return PlanError(texts) if isinstance(err, PlanError) else type(err)(texts[0])
