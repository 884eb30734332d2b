"""How much memory a capture may take, and who gets it: decided from shapes alone, before anything is captured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...errors import RequestError
from ..statistics.hessian import PANEL, HessianKind, Placement
from ..statistics.histogram import BINS
from ..statistics.layer import StatisticsSettings
from ..statistics.staging import LARGEST_SLOTS

GIB = 2**30
LEAST_STAGED, MOST_STAGED = 256, 8192  # the most is 30 steps of the default rows, prompt and negative
_SETTINGS = StatisticsSettings()


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that a capture may take. device_bytes: where the model runs; host_bytes: RAM; disk_bytes: temporary files.

    hessians: False keeps only the diagonal. sketch: layers that find no place get a sketch where one fits.
    """

    device_bytes: int = 4 * GIB
    host_bytes: int = 16 * GIB
    disk_bytes: int = 0
    hessians: bool = True
    sketch: bool = True

    def __post_init__(self) -> None:
        for name in ("device_bytes", "host_bytes", "disk_bytes"):
            if getattr(self, name) < 0:
                raise RequestError(f"the calibration budget has {name} = {getattr(self, name)}; give 0 or more.")


@dataclass(frozen=True, slots=True)
class Decision:
    """What a layer keeps, and where. placement is None without a Hessian. nbytes: of the Hessian, where it lies.

    staged_rows: how many rows wait on the device before they are worked in; None: as many as the plan says.
    """

    layer: str
    in_features: int
    kind: HessianKind
    placement: Placement | None
    nbytes: int
    staged_rows: int | None = None


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """decisions: one per layer, in the order of the layers. The bytes are what the capture will take at most.

    staged_rows: as the settings have it, or fewer where so many would leave no room.
    """

    decisions: tuple[Decision, ...]
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    staged_rows: int

    def decision(self, layer: str) -> Decision:
        return next(decision for decision in self.decisions if decision.layer == layer)

    def counts(self) -> dict[str, int]:
        """Layers by what they keep: {"full on device": 40, "sketch on host": 2, "diagonal": 3}."""
        result: dict[str, int] = {}
        for decision in self.decisions:
            where = f" on {decision.placement.value}" if decision.placement else ""
            key = decision.kind.value + where
            result[key] = result.get(key, 0) + 1
        return result

    def describe(self) -> str:
        """One sentence for the user."""
        parts = ", ".join(f"{count} {what}" for what, count in self.counts().items())
        return (
            f"Hessians: {parts}. Memory at most: {self.device_bytes / GIB:.2f} GiB on the device, "
            f"{self.host_bytes / GIB:.2f} GiB of RAM, {self.disk_bytes / GIB:.2f} GiB on disk."
        )


def fixed_bytes(in_features: int, settings: StatisticsSettings, kind: HessianKind = HessianKind.FULL) -> int:
    """What every layer takes on the device, without its Hessian.

    That is absmax and its slots, two sums, the histogram, held-out rows, and during a run the staged rows. Rows and
    slots are taken as 16-bit; a float32 model's take twice that.
    """
    rows = settings.reservoir_rows + settings.staged(kind) + LARGEST_SLOTS
    return in_features * (4 + 8 + 8) + BINS * 8 + rows * in_features * 2


def kept_bytes(decision: Decision, settings: StatisticsSettings) -> int:
    """What a layer that was seen holds on the device between runs: its statistics, without what waits for them."""
    hessian = decision.nbytes if decision.placement is Placement.DEVICE else 0
    return hessian + decision.in_features * (4 + 8 + 8 + settings.reservoir_rows * 2) + BINS * 8


def plan_budget(
    in_features: Mapping[str, int], budget: Budget = Budget(), settings: StatisticsSettings = _SETTINGS
) -> BudgetPlan:
    """Narrow layers first, as most of them fit: on the device, else in RAM, else on disk, else a sketch, else the
    diagonal alone. in_features: K by layer. The scratch memory of one layer at work is counted once, for the widest.

    Raises RequestError when device_bytes does not hold even the small statistics of all layers.
    """
    left = {
        Placement.DEVICE: budget.device_bytes,
        Placement.HOST: budget.host_bytes,
        Placement.DISK: budget.disk_bytes,
    }
    settings = _staging_that_fits(in_features, budget, settings)
    small = _small_bytes(in_features, budget, settings) + max(map(_scratch, in_features.values()), default=0)
    if small > budget.device_bytes:
        raise RequestError(
            f"the calibration of {len(in_features)} layers needs {small} bytes on the device without any "
            f"Hessian; the budget is {budget.device_bytes}. Raise it, keep fewer held-out rows, or "
            "capture fewer layers."
        )
    left[Placement.DEVICE] -= small
    decided: dict[str, Decision] = {}
    for layer, k in sorted(in_features.items(), key=lambda item: (item[1], item[0])):
        decided[layer] = _decide(layer, k, budget, settings, left)
    _stage_more(decided, settings.staged_rows, left)
    return BudgetPlan(
        tuple(decided[layer] for layer in in_features),
        budget.device_bytes - left[Placement.DEVICE],
        budget.host_bytes - left[Placement.HOST],
        budget.disk_bytes - left[Placement.DISK],
        settings.staged_rows,
    )


def _stage_more(decided: dict[str, Decision], staged: int, left: dict[Placement, int]) -> None:
    """What is left on the device lets more rows wait for the Hessians elsewhere: each time they are worked in, half of
    such a Hessian crosses to the RAM."""
    away = [d for d in decided.values() if d.kind is HessianKind.FULL and d.placement is not Placement.DEVICE]
    row = sum(decision.in_features * 2 for decision in away)
    more = min(MOST_STAGED - staged, left[Placement.DEVICE] // row) if away else 0
    if more > 0:
        left[Placement.DEVICE] -= more * row
        decided |= {decision.layer: replace(decision, staged_rows=staged + more) for decision in away}


def _small_bytes(in_features: Mapping[str, int], budget: Budget, settings: StatisticsSettings) -> int:
    kind = HessianKind.FULL if budget.hessians else HessianKind.DIAGONAL
    return sum(fixed_bytes(k, settings, kind) for k in in_features.values())


def _staging_that_fits(
    in_features: Mapping[str, int], budget: Budget, settings: StatisticsSettings
) -> StatisticsSettings:
    """Fewer rows wait where they would fill more than half of the device's budget: a Hessian there is worth more.

    The same where the scratch memory would not fit beside them.
    """
    most = min(budget.device_bytes // 2, budget.device_bytes - max(map(_scratch, in_features.values()), default=0))
    while settings.staged_rows > LEAST_STAGED and _small_bytes(in_features, budget, settings) > most:
        settings = replace(settings, staged_rows=max(LEAST_STAGED, settings.staged_rows // 2))
    return settings


def _scratch(k: int) -> int:
    """A panel of X^T X on its way."""
    return min(k, PANEL) * k * 4


def _decide(layer: str, k: int, budget: Budget, settings: StatisticsSettings, left: dict[Placement, int]) -> Decision:
    """Take the first choice that fits out of `left`."""
    choices: list[tuple[HessianKind, Placement, int]] = []
    if budget.hessians:
        choices += [(HessianKind.FULL, place, k * k * 4) for place in Placement]
    if budget.hessians and budget.sketch and settings.sketch_size < k:
        # The sketch, the rows that wait, and both once more, stacked for a shrinking.
        choices += [
            (HessianKind.SKETCH, place, 4 * settings.sketch_size * k * 4)
            for place in (Placement.DEVICE, Placement.HOST)
        ]
    for kind, place, nbytes in choices:
        if left[place] >= nbytes:
            left[place] -= nbytes
            return Decision(layer, k, kind, place, nbytes)
    return Decision(layer, k, HessianKind.DIAGONAL, None, 0)
