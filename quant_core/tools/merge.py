"""Putting files together and taking them apart: the diffusion model of a checkpoint, and shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ..checkpoint.metadata import CONFIG_SUFFIX, HEADER_KEY
from ..checkpoint.part import cannot_write, part_path, remove
from ..checkpoint.same_file import require_not_source
from ..checkpoint.source import Source
from ..checkpoint.suffixes import INDEX_SUFFIX, has_suffix, without_suffix
from ..errors import OutputError, PlanError, Problem, Remedy, RequestError, counted, some_of
from ..names.prefixes import MODEL_PREFIX, unwrapped
from ..policy.architectures import recognise
from ..progress import Clock, Progress
from ..stored.foreign import part_of, refusal
from ..stored.suffixes import QUANT_SUFFIXES
from .configs import header_object
from .rewrite import Draft, Rewrite


def model_prefix(src: Source) -> str | None:
    """What the names of the file's model begin with; None where the model is unknown, or its names need no change."""
    known = recognise({name: info.shape for name, info in src.tensors.items()})
    return known.prefix if known is not None and (known.prefix or known.inner) else None


def extract(src: Source, prefix: str | None = None) -> Rewrite:
    """The tensors under `prefix`, without it; the header's entries for them follow. All else is left out.

    What wrappers of single blocks left inside the names (`_orig_mod.`) is taken off too.
    prefix: None for the one that is found. Raises RequestError: nothing is under the prefix.
    """
    given, prefix = prefix, _prefix(src, prefix)
    names = {name: own for name in src.tensors if (own := _own_name(name, prefix)) is not None}
    if not names:
        raise _nothing_under(src, prefix, given is not None)
    first: dict[str, str] = {}
    draft = Draft(src, empty=True)
    for name, own in names.items():
        if own in first:
            raise RequestError(
                f"{src.path}: {first[own]} and {name} would both be called {own}. The file holds the model twice, or "
                "a part of it; save it again from the program that made it."
            )
        first[own] = name
        draft.take(src, name, own)
    _rename_header(draft, lambda layer: _own_name(layer, prefix))
    return draft.finish()


def _prefix(src: Source, given: str | None) -> str:
    if given is not None:
        return given
    found = model_prefix(src)
    return MODEL_PREFIX if found is None else found


def _own_name(name: str, prefix: str) -> str | None:
    """The name without the prefix and without wrappers inside it; None for what is not under the prefix."""
    behind = next((form[len(prefix) :] for form in (name, unwrapped(name)) if form.startswith(prefix)), None)
    return None if behind is None else unwrapped(behind)


def _nothing_under(src: Source, prefix: str, given: bool) -> RequestError:
    names = list(src.tensors)
    what = f"no tensor's name begins with {prefix!r}" if given else "it is not a full checkpoint of a known model"
    return RequestError(
        f"{src.path}: {what}; its tensors are called like {some_of([names[len(names) // 2], names[-1]])}. "
        "Use a diffusion model alone as it is.",
        "prefix",
        Remedy.PREFIX,
    )


def insert(checkpoint: Source, model: Source, prefix: str | None = None, *, force: bool = False) -> Rewrite:
    """The checkpoint with the tensors under `prefix` replaced by all of the model's.

    prefix: None for the one that is found.
    Raises PlanError: the checkpoint has weights or biases there that the model lacks, or the other way round, unless
    forced; RequestError: the checkpoint has nothing there.
    """
    given, prefix = prefix, _prefix(checkpoint, prefix)
    here = {name.removeprefix(prefix) for name in checkpoint.tensors if name.startswith(prefix)}
    if not here:
        raise _nothing_under(checkpoint, prefix, given is not None)
    strip = prefix if all(name.startswith(prefix) for name in model.tensors) else ""
    there = {name.removeprefix(strip) for name in model.tensors}
    problems = [
        Problem(
            f"{counted(len(names), 'tensor is', 'tensors are')} only in {where.path.name}: {some_of(sorted(names))}. "
            "Are these the same model?",
            "force",
            Remedy.DIFFER,
        )
        for names, where in ((_weights(here) - _weights(there), checkpoint), (_weights(there) - _weights(here), model))
        if names
    ]
    if problems and not force:
        raise PlanError(problems)
    draft = Draft(checkpoint)
    for name in checkpoint.tensors:
        if name.startswith(prefix):
            draft.drop(name)
    for name in model.tensors:
        draft.take(model, name, prefix + name.removeprefix(strip))
    kept = _header_layers(checkpoint, lambda layer: None if layer.startswith(prefix) else layer)
    new = _header_layers(model, lambda layer: prefix + layer.removeprefix(strip))
    for key, value in model.metadata.items():
        draft.metadata.setdefault(key, value)
    _set_layers(draft, {**kept, **new}, HEADER_KEY in checkpoint.metadata or HEADER_KEY in model.metadata)
    return draft.finish()


def join(src: Source) -> Rewrite:
    """All shards as one file: the same tensors, in order, with the headers' entries merged.

    Raises RequestError: one file was given, a shard of several or a whole model.
    """
    if part_of(src) is not None:
        raise RequestError(str(refusal(src)))
    if src.path.suffix.lower() != ".json":
        raise RequestError(f"{src.path}: this is one file already; there is nothing to join. Use it as it is.")
    return Draft(src).finish()


def split(
    src: Source,
    index: str | Path,
    max_bytes: int,
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> list[Path]:
    """Shards of at most max_bytes of data, and their index, which is written last; each layer stays in one shard.

    index: `<name>.safetensors.index.json`; the shards lie beside it. On an error no index and none of the new shards
    stays. Returns the shards. Raises RequestError (a bad name; a layer larger than max_bytes), OutputError.
    """
    index = Path(index)
    if not has_suffix(index.name, INDEX_SUFFIX):
        raise RequestError(f"{index}: the index's name must end in {INDEX_SUFFIX}. Rename it.")
    require_not_source(index, [src.path])
    if index.exists() and not overwrite:
        raise OutputError(f"{index}: the target exists. Choose another name.", "overwrite", Remedy.REPLACE)
    groups = _groups(src, max_bytes)
    stem = without_suffix(index.name, INDEX_SUFFIX)
    shards = [index.with_name(f"{stem}-{i:05}-of-{len(groups):05}.safetensors") for i in range(1, len(groups) + 1)]
    told = None if progress is None else _Whole(progress, len(src.tensors), src.nbytes)
    with ExitStack() as undo:
        for path, names in zip(shards, groups, strict=True):
            _shard(src, names).apply(path, overwrite=overwrite, force=True, progress=told, cancel=cancel)
            undo.callback(remove, path)
            if told is not None:
                told.next_shard()
        weight_map = {name: path.name for path, names in zip(shards, groups, strict=True) for name in names}
        content = {"metadata": {"total_size": src.nbytes}, "weight_map": weight_map}
        _write_text(index, json.dumps(content, indent=2, ensure_ascii=False))
        undo.pop_all()
    return shards


class _Whole:
    """Progress of all shards together, from that of one after the other."""

    def __init__(self, progress: Callable[[Progress], None], tensors: int, nbytes: int) -> None:
        self._progress, self._clock = progress, Clock(tensors, nbytes)
        self._seen = (0, 0)  # layers and bytes of the shard at hand that are counted

    def __call__(self, state: Progress) -> None:
        (layers, nbytes), self._seen = self._seen, (state.done_layers, state.done_bytes)
        self._progress(self._clock.advance(state.layer, state.done_bytes - nbytes, state.done_layers - layers))

    def next_shard(self) -> None:
        self._seen = (0, 0)


def _shard(src: Source, names: list[str]) -> Rewrite:
    draft = Draft(src, empty=True)
    for name in names:
        draft.take(src, name)
    owners = {_owner(name) for name in names}
    _rename_header(draft, lambda layer: layer if layer in owners else None)
    return draft.finish()


def _groups(src: Source, max_bytes: int) -> list[list[str]]:
    """Names of the shards' tensors, in file order as far as layers stay together."""
    layers: dict[str, list[str]] = {}
    for name in src.tensors:
        layers.setdefault(_owner(name), []).append(name)
    groups: list[list[str]] = [[]]
    filled = 0
    for layer, names in layers.items():
        size = sum(src.tensors[name].nbytes for name in names)
        if size > max_bytes:
            raise RequestError(
                f"{layer} alone takes {size} bytes, more than the {max_bytes} allowed for a shard.",
                "max_bytes",
                Remedy.RAISE,
            )
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1] += names
        filled += size
    return groups


def _owner(name: str) -> str:
    """The layer a tensor belongs to: also of `x.weight.absmax`."""
    return name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0] or name


def _weights(names: set[str]) -> set[str]:
    """Without what quantization adds to a layer."""
    suffixes = tuple(f".{suffix}" for suffix in (*QUANT_SUFFIXES, "scale_weight", "scale_input") if suffix != "weight")
    return {
        name
        for name in names
        if not name.endswith(suffixes) and ".weight." not in name and not name.endswith("scaled_fp8")
    }


def _header_layers(src: Source, rename: Callable[[str], str | None]) -> dict[str, object]:
    text = src.metadata.get(HEADER_KEY)
    layers = header_object(text)["layers"] if text is not None else {}
    return {new: config for layer, config in layers.items() if (new := rename(layer)) is not None}


def _rename_header(draft: Draft, rename: Callable[[str], str | None]) -> None:
    if HEADER_KEY in draft.metadata:
        _set_layers(draft, _header_layers(draft.src, rename), True)


def _set_layers(draft: Draft, layers: dict[str, object], present: bool) -> None:
    if not present:
        return
    text = draft.metadata.get(HEADER_KEY)
    old = header_object(text) if text is not None else {"format_version": "1.0"}
    described = {layer for layer in layers if layer + CONFIG_SUFFIX in draft or f"{layer}.weight" in draft}
    if not layers:
        draft.metadata.pop(HEADER_KEY, None)
    else:
        draft.metadata[HEADER_KEY] = json.dumps(
            {**old, "layers": {k: v for k, v in layers.items() if k in described}}, ensure_ascii=False
        )


def _write_text(path: Path, text: str) -> None:
    """All or nothing, as the sink does it for model files."""
    part = part_path(path)
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as err:
        remove(part)
        raise cannot_write(path, err) from err
