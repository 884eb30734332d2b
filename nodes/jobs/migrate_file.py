"""Migrating the file of a handle, either way."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...quant_core.checkpoint.source import Source
from ...quant_core.errors import RequestError
from ...quant_core.stored.layers import stored_layers
from ...quant_core.tools.canonicalize import InputScale
from ...quant_core.tools.contents import nothing_to_migrate
from ...quant_core.tools.migrate import MigrateOptions, check_hp_filter, migrate
from ...quant_core.tools.to_legacy import to_legacy
from ..shared.run_tool import Proposal

NAME = "Migrate Legacy File"
NATIVE, LEGACY = "comfy_quant", "legacy fp8_scaled"
FULL_PRECISION = {"as it is": None, "set": True, "remove": False}
INPUT_SCALES = {"keep": InputScale.KEEP, "1.0": InputScale.UNIT, "weight scale": InputScale.WEIGHT}


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateSettings:
    """The node's inputs, by their names."""

    target: str
    full_precision: str
    input_scale: str
    hp_filter: str
    header: bool
    scale_name: str = ""

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def plan(src: Source, settings: MigrateSettings) -> Proposal:
    """Raises QuantPressError; RequestError for a setting that the target does not have."""
    pattern = settings.hp_filter.strip() or None
    if settings.target == NATIVE:
        rewrite = migrate(
            src,
            MigrateOptions(
                pattern,
                FULL_PRECISION[settings.full_precision],
                INPUT_SCALES[settings.input_scale],
                settings.header,
                settings.scale_name.strip() or None,
            ),
        )
        # The file goes on as it is, as a graph should run on any file; the user learns what it is.
        return Proposal(rewrite, [] if rewrite.changes() else [nothing_to_migrate(src)])
    if FULL_PRECISION[settings.full_precision] is not None:
        raise RequestError(
            "The legacy form takes full precision from the layers as they are. Set full_precision to 'as it is', "
            "and put Edit Metadata before this node to change it."
        )
    if INPUT_SCALES[settings.input_scale] is InputScale.WEIGHT:
        raise RequestError("The legacy form gets an input scale of 1.0 or none. Choose keep or 1.0.")
    check_hp_filter(src, stored_layers(src), pattern)
    return Proposal(to_legacy(src, scale_input=INPUT_SCALES[settings.input_scale] is InputScale.UNIT))
