"""Repairing the file of a handle, or tidying a legacy one, and the findings as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...quant_core.checkpoint.source import Source, open_source
from ...quant_core.errors import RequestError, counted
from ...quant_core.pipeline.verify import Finding
from ...quant_core.tools.against import find_layout
from ...quant_core.tools.cleanup import add_legacy_input, cleanup_legacy
from ...quant_core.tools.repair import repair
from ..shared.folders import stamp
from ..shared.handles import QuantizedHandle, SourceHandle, origins_of
from ..shared.progress import NodeProgress
from ..shared.run_tool import Outcome, Proposal, Tool, run_tool
from ..shared.wording import in_inputs

NAME = "Repair"
AUTOMATIC = "automatic"
_ASSUME = "assume"
REPAIR, TIDY, ONLY_INPUTS = "repair", "tidy legacy", "legacy scale_input"


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairSettings:
    """The node's inputs, by their names. original: the model that the file was made from."""

    assume: str
    unswizzled: bool
    mode: str
    marker: str
    add_scale_input: bool
    keep_shapes: bool
    original: SourceHandle | None = None

    @property
    def layout(self) -> str | None:
        """The one that the user names; None where the tool finds it."""
        return None if self.assume == AUTOMATIC else self.assume

    def describe(self) -> dict[str, Any]:
        """JSON values that decide the result."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        original = None if self.original is None else [str(self.original.path), stamp(self.original.path)]
        return {**values, "original": original}


def repaired(
    handle: QuantizedHandle, settings: RepairSettings, only_diagnose: bool, progress: NodeProgress
) -> Outcome:
    """Outcome.data: every finding as JSON. Raises QuantPressError."""
    if settings.original is not None and (settings.layout is not None or settings.unswizzled):
        raise RequestError(
            "The connected original finds out the layout: set assume to automatic and unswizzled to off, or "
            "disconnect it."
        )
    reads = () if settings.original is None else origins_of(settings.original)
    return run_tool(
        handle,
        Tool(NAME, settings.describe(), only_diagnose, reads=reads),
        progress,
        lambda src: _plan(src, settings, "can be repaired" if only_diagnose else "repaired"),
    )


def _plan(src: Source, settings: RepairSettings, word: str) -> Proposal:
    """word: what is said of findings with an exact answer."""
    if settings.mode == ONLY_INPUTS:
        return Proposal(add_legacy_input(src), data=[])
    if settings.mode == TIDY:
        return Proposal(
            cleanup_legacy(
                src,
                marker=int(settings.marker),
                scale_input=settings.add_scale_input,
                normalise=not settings.keep_shapes,
            ),
            data=[],
        )
    assume, unswizzled, lines = settings.layout, settings.unswizzled, []
    if settings.original is not None:
        with open_source(settings.original.path) as reference:
            layout = find_layout(src, reference)
        assume, unswizzled = layout.assume, layout.unswizzled
        found = [f"assume {assume}"] * (assume is not None) + ["unswizzled"] * unswizzled
        how = " and ".join(found) or "the layout as it is"
        lines = [f"against the original: {layout.layer} is {layout.error:.2%} off with {how}"]
    result = repair(src, assume=assume, unswizzled=unswizzled)
    return Proposal(
        result.rewrite, [*lines, *_lines(result.findings, result.unfixed, word)], result.to_json()["findings"]
    )


def _lines(findings: Sequence[Finding], unfixed: Sequence[Finding], word: str) -> list[str]:
    """A count, then one line per code: how many, and the first message of them."""
    groups: dict[tuple[str, str, bool], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.code, finding not in unfixed), []).append(finding)
    if not groups:
        return ["no problems found"]
    lines = [
        f"{counted(len(findings), 'problem')}: {len(findings) - len(unfixed)} {word}"
        + (f", {len(unfixed)} without an exact answer, which stay as they are" if unfixed else "")
    ]
    lines += [
        f"  {severity} {code}{f' ({len(group)} x)' if len(group) > 1 else ''}{'' if fixed else ', NOT repaired'}: "
        f"{in_inputs(group[0].problem, (_ASSUME,))}"
        for (severity, code, fixed), group in groups.items()
    ]
    errors = sum(finding.severity == "error" for finding in unfixed)
    if errors:
        lines.append(
            f"warning: {counted(errors, 'error remains', 'errors remain')}, so the model may not load, or make noise; "
            "each line marked NOT repaired says what to do"
        )
    return lines
