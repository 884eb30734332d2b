"""Watching a model while it samples: the object that travels from Capture Activations to Collect Calibration.

The wrapped MODEL and the wire hold the same Capture, and ComfyUI's cache decides how long it lives. Hooks exist only
inside a sampling; what was captured survives an error or a cancel.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from comfy import model_management
from comfy.patcher_extension import WrappersMP

from ...quant_core.calibration.calibration import LayerSummary
from ...quant_core.calibration.calls import CallSample, call_group, call_key, is_recordable
from ...quant_core.calibration.capture.budget import Budget, BudgetPlan, plan_budget
from ...quant_core.calibration.capture.collector import CallContext, CaptureSettings, Collector
from ...quant_core.calibration.capture.linear_modules import linear_modules, refuse_compiled, shape_of
from ...quant_core.calibration.storage import save_calibration
from ...quant_core.cancel import cancel_scope
from ...quant_core.errors import Cancelled, RequestError
from .handles import CalibrationHandle
from .model_state import COMPILE_KEY, compiled, model_compiler_off, model_fingerprint
from .progress import NodeProgress
from .spool import spool_folder, sweep

_LABELS = {0: "cond", 1: "uncond"}
_PARAMETERS = ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options")
_PATCHES = ("patches", "patches_replace")
# The model brings its own of these; uuids name conditions of a run.
_NO_DATA = frozenset({*_PATCHES, "wrappers", "callbacks", "uuids"})
_SEED = 7  # place among the arguments of outer_sample
_OPTIONS = 3  # place of transformer_options among those that follow x and t in apply_model


@dataclass(slots=True)
class _Sampling:
    """One sampling that is watched. run: its number. calls: how many it has made.

    counted: predict_noise tells the steps. A guider of another pack may not come by it: its steps are told by sigma.
    """

    run: int
    note: str
    context: CallContext = field(default_factory=lambda: CallContext(step=-1))
    counted: bool = False
    calls: int = 0

    def note_call(self, sigma: float | None, options: Mapping[str, Any]) -> None:
        """sigma: None where the steps are counted."""
        if sigma is not None:
            self.context = CallContext(self.context.step + (sigma != self.context.sigma), sigma)
        labels = tuple(_LABELS.get(index, str(index)) for index in options.get("cond_or_uncond", ()))
        self.context = replace(self.context, labels=labels)


class Capture:
    """Made by `watch`. calls: most model calls kept whole. accumulate: False forgets all once it was collected."""

    def __init__(
        self, model: Any, pattern: str, budget: Budget, settings: CaptureSettings, calls: int, accumulate: bool
    ) -> None:
        self._root = model.get_model_object("diffusion_model")
        modules = linear_modules(self._root, _checked(pattern))
        self.plan: BudgetPlan = plan_budget(
            {name: shape_of(module)[1] for name, module in modules.items()}, budget, settings.statistics
        )
        self._collector = Collector(modules, self.plan, settings, model_fingerprint(model, modules))
        self.calls = CallSample(calls)
        self._runs = 0
        self._seed, self._accumulate = settings.seed, accumulate
        self._sampling: _Sampling | None = None
        self._lock = threading.Lock()
        self._collected: tuple[CalibrationHandle, list[LayerSummary]] | None = None
        self._label = type(model.model.model_config).__name__.lower()

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        """Copies of a MODEL go on filling the same capture."""
        return self

    # ---- while sampling ----------------------------------------------------------------------------------------
    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of a whole sampling.

        Its arguments: (noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed).
        """
        guider = executor.class_obj
        if guider.model_patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY):
            raise compiled()
        sampled = guider.model_patcher.get_model_object("diffusion_model")  # with what other nodes put in its place
        refuse_compiled(sampled)
        if sampled is not self._root:
            raise RequestError(
                "Capture Activations: another model is being sampled than the one that it was given. Connect its "
                "MODEL output to the sampler, with no node between that replaces the model."
            )
        if not self._lock.acquire(blocking=False):  # a sampling inside a sampling: the outer one's hooks see it
            return executor(*args, **kwargs)
        seed = kwargs.get("seed", args[_SEED] if len(args) > _SEED else None)
        patched = len(guider.model_patcher.patches)
        loras = (f"{patched} patched weights",) if patched else ()
        self._runs += 1
        sampling = _Sampling(self._runs, "" if seed is None else f"seed {seed}")
        try:
            self._sampling, self._collected = sampling, None
            with (
                model_compiler_off(),
                self._collector.capture(self._root, lambda: sampling.context, sampling.note, loras),
            ):
                return executor(*args, **kwargs)
        finally:
            self._sampling = None
            self._lock.release()

    def prepare_sampling(self, executor: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of the loading of the models: room for the record is left on the device."""
        with _needs_more_memory(model.model, self._collector.missing_device_bytes()):
            return executor(model, *args, **kwargs)

    def predict_noise(self, executor: Any, x: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of one look at the noise, of all conditions: (x, timestep, model_options, seed). Counts steps."""
        sampling = self._sampling
        if sampling is not None:
            sampling.counted = True
            # The value of the sigma would wait for the GPU.
            sampling.context = CallContext(sampling.context.step + 1, timestep.flatten()[0].clone())
        return executor(x, timestep, *args, **kwargs)

    def apply_model(self, executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of one call: (x, t, c_concat, c_crossattn, control, transformer_options).

        Notes the conditions' labels. Of the calls inside a captured sampling some are kept whole.
        """
        sampling = self._sampling
        if sampling is not None:
            options = kwargs.get("transformer_options") or (args[_OPTIONS] if len(args) > _OPTIONS else {})
            sampling.note_call(float(t.flatten()[0]) if not sampling.counted else None, options)
            self.calls.offer(
                lambda: call_arguments(executor.class_obj, x, t, args, kwargs),
                call_key(self._seed, sampling.run, sampling.calls),
                call_group(self._seed, sampling.run, sampling.note),
            )
            sampling.calls += 1
        return executor(x, t, *args, **kwargs)

    # ---- afterwards --------------------------------------------------------------------------------------------
    def collect(self, progress: NodeProgress) -> tuple[CalibrationHandle, list[LayerSummary]]:
        """Everything captured so far, as a file in the spool folder, and its table.

        Raises RequestError when that is nothing, and ComfyUI's InterruptProcessingException after Cancel: the capture
        stays as it was, and no file.
        """
        try:
            with self._lock, cancel_scope(progress.cancelled):
                return self._collect(progress)
        except Cancelled:
            model_management.throw_exception_if_processing_interrupted()
            raise

    def _collect(self, progress: NodeProgress) -> tuple[CalibrationHandle, list[LayerSummary]]:
        if self._collected is None or not self._collected[0].path.is_file():
            calibration = self._collector.result()
            calibration.require_captured()
            calibration.calls = self.calls
            sweep()
            rows = calibration.table()
            path = spool_folder() / f"calibration-{self._label}-{secrets.token_hex(6)}.safetensors"
            save_calibration(calibration, path, progress=progress)
            self._collected = CalibrationHandle(path, self._label), rows
            if not self._accumulate:
                self._collector.reset()
                self.calls.reset()
                self._runs = 0
        return self._collected


def call_arguments(base: Any, x: Any, t: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What a call of a BaseModel's apply_model was given, by name; of transformer_options only what is data.

    None when a replay on the model alone would differ: the conditioning or the sampling brought weights or patches.
    """
    arguments = {**dict(zip(_PARAMETERS, (x, t, *args), strict=False)), **kwargs}
    options, patcher = arguments.pop("transformer_options", None) or {}, base.current_patcher
    if patcher is None or patcher.current_hooks is not None:
        return None
    own = patcher.model_options.get("transformer_options", {})
    data = {name: value for name, value in options.items() if name not in _NO_DATA and is_recordable(value)}
    if _patch_counts(options) != _patch_counts(own) or not options.keys() <= {*data, *own, *_NO_DATA}:
        return None
    return {**arguments, "transformer_options": data}


def _patch_counts(options: dict[str, Any]) -> dict[tuple[str, Any], int]:
    return {(kind, name): len(entries) for kind in _PATCHES for name, entries in options.get(kind, {}).items()}


@contextmanager
def _needs_more_memory(base: Any, extra_bytes: int) -> Iterator[None]:
    """ComfyUI's loader asks the model what it needs beside its weights.

    It offers nodes no other way to ask for more.
    """
    plain, own = base.memory_required, base.__dict__.get("memory_required")
    base.memory_required = lambda *args, **kwargs: plain(*args, **kwargs) + extra_bytes
    try:
        yield
    finally:
        del base.memory_required
        if own is not None:
            base.memory_required = own


def _checked(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as err:
        raise RequestError(
            f"layers: {pattern!r} is not a regular expression: {err}. Leave it empty to record all layers."
        ) from err
    return pattern or None
