"""A rewrite: which tensors and header entries a new file has, and where each comes from.

Every tool is a function from open sources to a Rewrite. It is the dry run, too: `changes()` lists what differs. What
no tool touched is copied byte for byte, under the same name, with the same header entry.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cancel import cancel_scope, poll
from ..checkpoint.header import TORCH_TO_CODE, OutputTensor, tensor_bytes
from ..checkpoint.sink import Sink, open_sink
from ..checkpoint.source import Source
from ..errors import Remedy, RequestError, VerificationError, counted, some_of
from ..pipeline.verify import check_file
from ..progress import Clock, Progress

# Findings about which layers are quantized at all: rewriting neither brings them about nor mends them.
OF_THE_LAYERS = ("kernel-refuses", "packed-shape", "not-linear", "not-for-comfyui")


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes of one tensor of a source. dtype, shape: as they shall stand in the new header."""

    src: Source
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that is computed when it is written; at most one is in memory at a time.

    of: the source tensors it is made from, for the preview.
    """

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """kind: renamed, retyped (same bytes), rewritten, added, dropped, header-set, header-dropped."""

    kind: str
    name: str
    before: str
    after: str

    def to_json(self) -> dict[str, str]:
        return {"kind": self.kind, "name": self.name, "before": self.before, "after": self.after}

    def __str__(self) -> str:
        arrow = f"{self.before} -> {self.after}" if self.before and self.after else self.before or self.after
        return f"{self.kind}: {self.name}: {arrow}"


class Draft:
    """A rewrite in the making: begins as a copy of `src`; tools change it and call `finish`."""

    def __init__(self, src: Source, *, empty: bool = False) -> None:
        self.src = src
        self._outputs: dict[str, Copy | Made] = (
            {} if empty else {name: Copy(src, name, info.dtype, info.shape) for name, info in src.tensors.items()}
        )
        self.metadata: dict[str, str] = dict(src.metadata)
        self.notes: list[str] = []
        self._sources = [src]
        self._after: dict[str, list[str]] = {}  # anchor: names to be placed behind it, in order

    def __contains__(self, name: str) -> bool:
        return name in self._outputs

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._outputs))

    def content(self, name: str) -> Copy | Made:
        return self._outputs[name]

    def is_copy(self, name: str) -> bool:
        return isinstance(self._outputs[name], Copy)

    def drop(self, name: str) -> None:
        del self._outputs[name]

    def rename(self, old: str, new: str) -> None:
        """Same place, another name. RequestError when `new` is taken."""
        if new != old and new in self._outputs:
            raise RequestError(
                f"{self.src.path}: {old} cannot become {new}, which is there already. Drop one of them."
            )
        self._outputs = {new if name == old else name: content for name, content in self._outputs.items()}

    def retype(self, name: str, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> None:
        """The same bytes under another dtype or shape. ValueError when their sizes differ."""
        old = self._outputs[name]
        if not isinstance(old, Copy):
            raise ValueError(f"{name} is not a copy")
        new = Copy(old.src, old.name, dtype or old.dtype, old.shape if shape is None else shape)
        if tensor_bytes(new.dtype, new.shape) != tensor_bytes(old.dtype, old.shape):
            raise ValueError(f"{name}: {old.dtype} {old.shape} and {new.dtype} {new.shape} differ in size")
        self._outputs[name] = new

    def put(self, name: str, tensor: Tensor, after: str | None = None, of: tuple[str, ...] = ()) -> None:
        """A small tensor that is known now."""
        fixed = tensor.detach().cpu().contiguous()
        self.make(name, TORCH_TO_CODE[fixed.dtype], tuple(fixed.shape), lambda: fixed, after, of)

    def make(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        make: Callable[[], Tensor],
        after: str | None = None,
        of: tuple[str, ...] = (),
    ) -> None:
        """A tensor computed when it is written, in place of an old one of this name, or behind `after`, or last."""
        content = Made(dtype, shape, make, of)
        if name in self._outputs:
            self._outputs[name] = content
            return
        self._outputs[name] = content
        if after is not None:
            self._after.setdefault(after, []).append(name)

    def take(self, src: Source, name: str, new: str | None = None) -> None:
        """Copy a tensor of another source, last. RequestError when the name is taken."""
        new = new or name
        if new in self._outputs:
            raise RequestError(f"{src.path}: {new} is in both files. Take it from one of them only.")
        if src not in self._sources:
            self._sources.append(src)
        info = src.tensors[name]
        self._outputs[new] = Copy(src, name, info.dtype, info.shape)

    def finish(self) -> Rewrite:
        ordered: dict[str, Copy | Made] = {}
        moved = {name for names in self._after.values() for name in names if name in self._outputs}

        def place(name: str) -> None:
            if name in self._outputs and name not in ordered:
                ordered[name] = self._outputs[name]
                for follower in self._after.get(name, ()):
                    place(follower)

        for name in self._outputs:
            if name not in moved:
                place(name)
        for name in self._outputs:  # anchors that are gone
            place(name)
        return Rewrite(tuple(self._sources), ordered, dict(self.metadata), tuple(self.notes))


@dataclass(frozen=True, slots=True)
class Rewrite:
    """outputs: every tensor of the new file, in order. metadata: its header entries. notes: sentences for the user.
    told: codes of errors that the new file will have, and that the user was told of. A check of the sources cannot
    find them.

    The sources must stay open until it was applied.
    """

    sources: tuple[Source, ...]
    outputs: Mapping[str, Copy | Made]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()
    told: tuple[str, ...] = ()

    def entries(self) -> list[OutputTensor]:
        return [OutputTensor(name, content.dtype, content.shape) for name, content in self.outputs.items()]

    @property
    def nbytes(self) -> int:
        return sum(tensor_bytes(content.dtype, content.shape) for content in self.outputs.values())

    def changes(self) -> tuple[Change, ...]:
        """Everything that differs from the first source; empty when the new file would be the same."""
        src, found = self.sources[0], []
        used: set[str] = set()
        for name, content in self.outputs.items():
            after = f"{content.dtype} {list(content.shape)}"
            old = src.tensors.get(name)
            before = f"{old.dtype} {list(old.shape)}" if old else ""
            if isinstance(content, Made):
                used.update(content.of)
                found.append(Change("rewritten" if old else "added", name, before, after))
            elif content.src is not src:
                found.append(Change("added", name, "", f"{after} from {content.src.path.name}"))
            else:
                used.add(content.name)
                if content.name != name:
                    found.append(Change("renamed", name, content.name, name))
                elif before != after:
                    found.append(Change("retyped", name, before, after))
        for name, info in src.tensors.items():
            if name not in used and name not in self.outputs:
                found.append(Change("dropped", name, f"{info.dtype} {list(info.shape)}", ""))
        return (*found, *_header_changes(src.metadata, self.metadata))

    def to_json(self) -> dict[str, Any]:
        changes = self.changes()
        return {
            "source": str(self.sources[0].path),
            "tensors": len(self.outputs),
            "bytes": self.nbytes,
            "summary": dict(Counter(change.kind for change in changes)),
            "changes": [change.to_json() for change in changes],
            "notes": list(self.notes),
        }

    def apply(
        self,
        target: str | Path,
        *,
        overwrite: bool = False,
        force: bool = False,
        reads: Sequence[Path] = (),
        progress: Callable[[Progress], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> None:
        """Write and verify the file; nothing appears under the target's name unless all went well.

        reads: files that were read beside the sources, which the target must not be either.
        Verified: every copied tensor, as Sink.copy does, and that no error of `check_file` is new; force leaves out
        the latter. Raises QuantPressError.
        """
        known = Counter() if force else sum((_errors(src.path) for src in self.sources), Counter(self.told))
        files = [*(file for src in self.sources for file in src.files), *reads]
        with (
            cancel_scope(cancel),
            open_sink(target, self.entries(), self.metadata, overwrite=overwrite, sources=files) as sink,
        ):
            clock = Clock(len(self.outputs), self.nbytes)
            for name, content in self.outputs.items():
                poll()
                _write(sink, name, content)
                state = clock.advance(name, tensor_bytes(content.dtype, content.shape))
                if progress is not None:
                    progress(state)
            for src in self.sources:
                src.check_unchanged()
            sink.commit(verify=None if force else lambda part: _require_no_new_errors(part, known))


def _write(sink: Sink, name: str, content: Copy | Made) -> None:
    if isinstance(content, Made):
        tensor = content.make()
        sink.write(name, tensor if TORCH_TO_CODE.get(tensor.dtype) == content.dtype else tensor.view(torch.uint8))
    else:
        sink.copy(content.src, content.name, name)


def _require_no_new_errors(part: Path, known: Counter[str]) -> None:
    """What the source has under other names is no fault of the rewriting."""
    errors = [finding for finding in check_file(part).errors if finding.code not in OF_THE_LAYERS]
    new = Counter(finding.code for finding in errors) - known
    if new:
        messages = [f.message for f in errors if f.code in new]
        raise VerificationError(
            f"the result would have {counted(sum(new.values()), 'error')} that the source has not: "
            f"{some_of(messages, ' ', 4)} Nothing was written.",
            "force",
            Remedy.FORCE,
        )


def _errors(path: Path) -> Counter[str]:
    return Counter(finding.code for finding in check_file(path).errors)


def _header_changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    found = []
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            kind = "header-set" if key in after else "header-dropped"
            found.append(Change(kind, key, _short(before.get(key, "")), _short(after.get(key, ""))))
    return found


def _short(text: str) -> str:
    return text if len(text) <= 120 else json.dumps(text[:110])[1:-1] + f"... ({len(text)} characters)"
