"""Watching a model while it samples: hooks on its linear layers, only for as long as a run lasts."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import RequestError
from ..calibration import Calibration, ModelIdentity, RunRecord
from ..statistics.hessian import HessianKind, Placement
from ..statistics.layer import LayerStatistics, StatisticsSettings
from ..statistics.selection import Chosen, chunk_labels, select_rows
from .budget import BudgetPlan, kept_bytes
from .linear_modules import refuse_compiled, shape_of


@dataclass(frozen=True, slots=True)
class CallContext:
    """What the model is being called with. step: the sampling step's number, so that calls of one step share a quota.

    sigma: a number, or a tensor () that is read when the run ends, so that nothing waits for the GPU before.
    labels: of the chunks that the batch consists of, in order ("cond", "uncond"); () when unknown.
    """

    step: int = 0
    sigma: float | Tensor | None = None
    labels: tuple[str, ...] = ()


Weighting = Callable[[CallContext, str], float]
ABSMAX_WHOLE = 1024
DIAGONAL_SHARE = 4


@dataclass(frozen=True, slots=True)
class CaptureSettings:
    """rows_per_step: most rows that a layer gives per step and label, so that no step outweighs another.

    A layer that keeps only its diagonal gives a quarter of them: means and sizes need fewer rows than products.

    absmax_stride: of an input with more than ABSMAX_WHOLE rows, look at every n-th one for the absmax, another n-th at
    every call. 1 is the true absmax; reading all inputs once more is most of what a capture costs on a GPU.
    holdout: share of the rows kept for judging. weighting: (context, label) -> weight of a row >= 0, None for 1;
    weighting_name is what the file says about it.
    """

    seed: int = 0
    rows_per_step: int = 128
    absmax_stride: int = 4
    holdout: float = 1 / 16
    weighting: Weighting | None = None
    weighting_name: str = "uniform"
    statistics: StatisticsSettings = StatisticsSettings()

    def __post_init__(self) -> None:
        for name in ("rows_per_step", "absmax_stride"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}; at least 1 is needed.")
        if not 0.0 <= self.holdout < 1.0:
            raise RequestError(f"holdout is {self.holdout}; a share from 0 to below 1 is needed.")


class Collector:
    """Gathers statistics over any number of runs of one model. Not for several threads at once.

    modules: the layers by name, e.g. linear_modules(model). plan: of budget.py, for the same layers.
    Several devices: a layer's statistics stay where its first input was.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        plan: BudgetPlan,
        settings: CaptureSettings = CaptureSettings(),
        fingerprint: str = "",
    ) -> None:
        self.modules = dict(modules)
        self.settings = replace(settings, statistics=replace(settings.statistics, staged_rows=plan.staged_rows))
        self._plan = plan
        self._decisions = {decision.layer: decision for decision in plan.decisions}
        shapes = {name: shape_of(module) for name, module in self.modules.items()}
        if {name: shape[1] for name, shape in shapes.items()} != {d.layer: d.in_features for d in plan.decisions}:
            raise ValueError("the budget was planned for other layers")
        self.model = ModelIdentity(shapes, fingerprint)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._context: CallContext | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything captured."""
        self._statistics: dict[str, LayerStatistics] = {}
        self._runs: list[RunRecord] = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def missing_device_bytes(self) -> int:
        """What a run may still take on the device, beside what the statistics hold there already."""
        held = sum(kept_bytes(self._decisions[name], self.settings.statistics) for name in self._statistics)
        return max(0, self._plan.device_bytes - held)

    def result(self) -> Calibration:
        """What was captured so far; the statistics are the collector's own, so take it when sampling is over."""
        ordered = {name: self._statistics[name] for name in self.modules if name in self._statistics}
        return Calibration(
            self.model,
            ordered,
            tuple(self._runs),
            self.settings.seed,
            self.settings.statistics,
            self.settings.weighting_name,
        )

    @contextlib.contextmanager
    def capture(
        self,
        root: nn.Module,
        context: Callable[[], CallContext] | None = None,
        note: str = "",
        loras: Sequence[str] = (),
    ) -> Iterator[None]:
        """Watch one run. root: the module whose every call begins a new look (the diffusion model).

        context: asked at the beginning of every call of root; None counts each call as a step. On any exit, errors and
        cancels included, the hooks go and what was captured stays; the run's record says whether it completed.
        """
        refuse_compiled(root)
        self._begin_run(RunRecord(note=note, loras=tuple(loras)))
        with contextlib.ExitStack() as hooks:

            def begin(
                module: nn.Module, args: object
            ) -> None:  # a hook that returned something would change the input
                self._begin_call(context)

            hooks.callback(root.register_forward_pre_hook(begin).remove)
            for name, module in self.modules.items():
                handle = module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
                hooks.callback(handle.remove)
            try:
                yield
                self._runs[-1] = replace(self._runs[-1], completed=True)
            finally:
                self._end_run()

    # ---- a run -------------------------------------------------------------------------------------------------
    def _begin_run(self, record: RunRecord) -> None:
        self._runs.append(record)
        self._context, self._call = None, -1
        self._taken: dict[tuple[str, str], int] = {}  # (layer, label) -> rows of this step
        self._chosen: dict[tuple[object, ...], Chosen] = {}
        self._on_device: dict[tuple[object, ...], Tensor] = {}
        self._steps: dict[int, dict[str, int]] = {}  # step -> layer -> rows
        self._sigmas: dict[int, float | Tensor] = {}
        self._labels: dict[str, int] = {}

    def _begin_call(self, context: Callable[[], CallContext] | None) -> CallContext:
        self._call += 1
        now = context() if context is not None else CallContext(step=self._call)
        if self._context is None or now.step != self._context.step:
            self._taken = {}
        self._context = now
        self._chosen, self._on_device = {}, {}
        if now.sigma is not None:
            self._sigmas[now.step] = now.sigma
        return now

    def _end_run(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for statistics in self._statistics.values():
                statistics.flush()
        steps = {step: max(rows.values()) for step, rows in self._steps.items()}
        self._runs[-1] = replace(self._runs[-1], steps=steps, sigmas=_numbers(self._sigmas), labels=self._labels)
        self._context, self._taken, self._chosen, self._on_device = None, {}, {}, {}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            # Not inference tensors, for the sums live on; and no autocast, which would round the products to bf16.
            with torch.inference_mode(False), torch.no_grad(), _without_autocast(x.device.type):
                self._look(name, x.detach())

        return before

    # ---- a layer's input ---------------------------------------------------------------------------------------
    def _look(self, name: str, x: Tensor) -> None:
        """x: [..., K]."""
        # Without a context the layer was called outside of root.
        context = self._begin_call(None) if self._context is None else self._context
        flat = x.reshape(-1, x.shape[-1])
        rows = flat.shape[0]
        statistics = self._statistics_of(name, flat.device)
        stride = self.settings.absmax_stride if rows > ABSMAX_WHOLE else 1
        statistics.see(flat if stride == 1 else flat[self._call % stride :: stride])
        if not rows:
            return
        labels = chunk_labels(x.shape, context.labels) or ("",)
        chosen = self._rows_of(name, statistics.kind, rows, context, labels)
        if not chosen.parts:
            return
        statistics.stage(flat, self._moved(chosen.index, flat.device), chosen.parts)
        layers = self._steps.setdefault(context.step, {})
        for part in chosen.parts:
            self._taken[name, part.label] = self._taken.get((name, part.label), 0) + part.count
            if part.keys is None:
                self._labels[part.label] = self._labels.get(part.label, 0) + part.count
                layers[name] = layers.get(name, 0) + part.count

    def _rows_of(
        self, name: str, kind: HessianKind, rows: int, context: CallContext, labels: tuple[str, ...]
    ) -> Chosen:
        """The choice depends on the call and the sizes alone, so that layers share one draw."""
        cap, chunks = self.settings.rows_per_step, []
        if kind is HessianKind.DIAGONAL:
            cap = max(1, cap // DIAGONAL_SHARE)
        for label in labels:
            share = labels.count(label)  # a label may have several chunks in a call
            chunks.append(
                (label, self._weight(context, label), max(0, cap - self._taken.get((name, label), 0)) // share)
            )
        key = (rows, tuple(chunks))
        if key not in self._chosen:
            text = f"run {len(self._runs)}, call {self._call}, rows {rows}, chunks {chunks}"
            self._chosen[key] = select_rows(rows, chunks, self.settings.holdout, self.settings.seed, text)
        return self._chosen[key]

    def _weight(self, context: CallContext, label: str) -> float:
        if self.settings.weighting is None:
            return 1.0
        weight = float(self.settings.weighting(context, label))
        if not 0.0 <= weight < float("inf"):
            raise RequestError(
                f"the row weighting {self.settings.weighting_name!r} gave {weight} for step "
                f"{context.step}; a finite number >= 0 is needed."
            )
        return weight

    def _moved(self, index: Tensor, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return index
        key = (id(index), device)  # the indices live as long as the call's choice, so ids are unique
        if key not in self._on_device:
            self._on_device[key] = index.to(device, non_blocking=True)
        return self._on_device[key]

    def _statistics_of(self, name: str, device: torch.device) -> LayerStatistics:
        if name not in self._statistics:
            decision = self._decisions[name]
            folder = self._disk_folder() if decision.placement is Placement.DISK else None
            settings = self.settings.statistics
            if decision.staged_rows is not None:
                settings = replace(settings, staged_rows=decision.staged_rows)
            self._statistics[name] = LayerStatistics(
                decision.in_features,
                device,
                decision.kind,
                decision.placement or Placement.DEVICE,
                settings,
                folder,
                f"{len(self._statistics):05d}",
            )
        return self._statistics[name]

    def _disk_folder(self) -> Path:
        if self._folder is None:
            # Windows removes no file that is still mapped; what stays is in the system's temporary folder.
            self._folder = tempfile.TemporaryDirectory(prefix="quantpress-calibration-", ignore_cleanup_errors=True)
        return Path(self._folder.name)


def _numbers(values: Mapping[int, float | Tensor]) -> dict[int, float]:
    """Tensors () as floats, all fetched at once."""
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    fetched = dict(zip(tensors, torch.stack([*tensors.values()]).tolist(), strict=True)) if tensors else {}
    return {key: fetched.get(key, value) for key, value in values.items()}


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
