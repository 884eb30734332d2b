"""The way back: every quantized layer decoded with its own scales into a plain file, one layer in memory at a time."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .._version import __version__
from ..checkpoint.header import TORCH_TO_CODE, TensorInfo
from ..checkpoint.metadata import HEADER_KEY
from ..checkpoint.source import Source, open_source
from ..errors import InputFileError, Remedy, RequestError, some_of
from ..pipeline.plan import RECIPE_KEY
from ..progress import Clock, Progress
from ..stored.layers import StoredLayer, stored_layers
from ..stored.legacy import LEGACY_MARKER, LEGACY_NAMES
from ..stored.suffixes import QUANT_SUFFIXES
from .rewrite import Draft, Rewrite

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Weights cast to FP8 without a scale: their values are what is stored, and all three dtypes hold them exactly.
_UNSCALED = {"F8_E4M3": "float8_e4m3fn without a scale", "F8_E5M2": "float8_e5m2 without a scale"}


@dataclass(frozen=True, slots=True)
class DequantizeReport:
    """layers: {format: number of layers decoded}. dropped: legacy markers and dummy scales that are left out."""

    source: str
    target: str
    dtype: str
    layers: Mapping[str, int]
    dropped: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Job:
    """A tensor to be decoded into `name`. stored: None when it is unscaled FP8. source: format, for the report."""

    name: str
    shape: tuple[int, ...]
    stored: StoredLayer | None
    source: str
    bytes_in: int


def dequantize(
    source: str | Path,
    target: str | Path,
    dtype: str = "bf16",
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> DequantizeReport:
    """Decode all quantized layers of a file to `dtype` ("bf16", "fp16", "fp32"); copy all else byte for byte.

    The header loses `_quantization_metadata`, and its QuantPress record says what was decoded.
    Raises QuantPressError: nothing is quantized, a scale that belongs to nothing, a value that dtype cannot hold;
    on any error no target appears.
    """
    started = time.monotonic()
    if dtype not in DTYPES:
        raise RequestError(f"{dtype} is not offered. Choose one of {', '.join(DTYPES)}.", "dtype")
    with open_source(source) as src:
        stored = stored_layers(src)
        consumed = {name for layer in stored.values() for name in layer.names.values()}
        dropped = _dropped(src, stored, consumed)
        jobs = _jobs(src, stored)
        if not jobs:
            raise RequestError(f"{src.path}: nothing in it is quantized. Use the file as it is.")
        layers = Counter(job.source for job in jobs.values())
        draft = Draft(src)
        for name in consumed | dropped:
            if name not in jobs:
                draft.drop(name)
        for name, job in jobs.items():
            code = TORCH_TO_CODE[DTYPES[dtype]]
            draft.make(name, code, job.shape, partial(_decode, src, job, dtype), of=(name,))
        draft.metadata = _metadata(src, dtype, layers)
        rewrite = draft.finish()
        tell = None if progress is None else _by_layers(rewrite, src, jobs, started, progress)
        rewrite.apply(target, overwrite=overwrite, progress=tell, cancel=cancel)
        return DequantizeReport(
            str(source),
            str(target),
            dtype,
            dict(layers),
            tuple(sorted(dropped)),
            src.nbytes,
            rewrite.nbytes,
            time.monotonic() - started,
        )


def _by_layers(
    rewrite: Rewrite, src: Source, jobs: Mapping[str, _Job], started: float, progress: Callable[[Progress], None]
) -> Callable[[Progress], None]:
    """Progress that counts layers and the bytes of the source, where a rewrite counts tensors and its own bytes."""
    sizes = {name: jobs[name].bytes_in if name in jobs else src.tensors[name].nbytes for name in rewrite.outputs}
    clock = Clock(len(jobs), sum(sizes.values()), started=started)

    def tell(state: Progress) -> None:
        progress(clock.advance(state.layer, sizes[state.layer], layers=int(state.layer in jobs)))

    return tell


def _jobs(src: Source, stored: Mapping[str, StoredLayer]) -> dict[str, _Job]:
    """{tensor name: job}, in file order."""
    jobs = {}
    for name, info in src.tensors.items():
        layer = stored.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is not None:
            count = sum(src.tensors[part].nbytes for part in layer.names.values())
            jobs[name] = _Job(name, layer.shape, layer, layer.format.name, count)
        elif info.dtype in _UNSCALED and name != LEGACY_MARKER and not _is_scale(name):
            jobs[name] = _Job(name, info.shape, None, _UNSCALED[info.dtype], info.nbytes)
    return jobs


def _is_scale(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in LEGACY_NAMES or (last in QUANT_SUFFIXES and last != "weight")


def _dropped(src: Source, stored: Mapping[str, StoredLayer], consumed: set[str]) -> set[str]:
    """The legacy markers, and the dummy scales of 16-bit layers. InputFileError: any other scale without its layer."""
    dropped, orphans = set(), []
    for name in src.tensors:
        layer, _, last = name.rpartition(".")
        weight = src.tensors.get(f"{layer}.weight")
        if name == LEGACY_MARKER or name.endswith(f".{LEGACY_MARKER}"):
            dropped.add(name)
        elif name in consumed or not _is_scale(name):
            continue
        elif last in LEGACY_NAMES and layer not in stored and weight is not None and not _is_coded(weight):
            dropped.add(name)
        else:
            orphans.append(name)
    if orphans:
        raise InputFileError(
            f"{src.path}: {len(orphans)} scales belong to no quantized layer that this pack reads: "
            f"{some_of(orphans)}. Run `quantpress verify` on the file, or take its 16-bit source."
        )
    return dropped


def _is_coded(weight: TensorInfo) -> bool:
    return weight.dtype in _UNSCALED or weight.dtype in ("I8", "U8")


def _metadata(src: Source, dtype: str, layers: Mapping[str, int]) -> dict[str, str]:
    kept = {key: value for key, value in src.metadata.items() if key not in (HEADER_KEY, RECIPE_KEY)}
    record = {
        "version": __version__,
        "source": src.path.name,
        "source_hash": src.identity_hash(),
        "dequantized": {"dtype": dtype, "layers": dict(layers)},
    }
    return {**kept, RECIPE_KEY: json.dumps(record, sort_keys=True)}


def _decode(src: Source, job: _Job, dtype: str) -> Tensor:
    if job.stored is None:
        return src.read(job.name).to(torch.float32).to(DTYPES[dtype])
    decoded = job.stored.decode(src)
    weight = decoded.to(DTYPES[dtype])
    if not bool(torch.isfinite(weight).all()):
        if not bool(torch.isfinite(decoded).all()):
            raise InputFileError(
                f"{job.name}: the layer decodes to NaN or Inf: its scales or codes are damaged. Run "
                "`quantpress verify` on the file, and take it from its source again."
            )
        raise RequestError(
            f"{job.name}: the largest weight is {float(decoded.abs().max()):.4g}, which {DTYPES[dtype]} cannot hold.",
            "dtype",
            Remedy.WIDER,
        )
    return weight.contiguous()
