"""ComfyUI's own model detection, run on a checkpoint's header.

Detection reads the shapes of some weights, and nothing tells it that a weight is packed. So it is run on a dict that
records what it reads: those layers keep their shape. And it is run again on the finished file, where it must answer
the same, or ComfyUI would build another model than the one that was quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from ...quant_core.checkpoint.header import CODE_TO_TORCH
from ...quant_core.checkpoint.source import Source, open_source
from ...quant_core.errors import VerificationError
from ...quant_core.stored.layers import stored_layers

_SMALL_BYTES = 1 << 16  # detection looks at the values of some norms and scalars, never at those of a matrix


class RecordingDict(dict[str, Any]):
    """A state dict made from a header: large tensors on the meta device, small ones read.

    asked: keys that were read.
    shapes: other shapes than the header's, {tensor: shape}.
    """

    def __init__(self, source: Source, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(dict.fromkeys(source.tensors))
        self._source, self._shapes = source, shapes
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> torch.Tensor:
        super().__getitem__(key)  # KeyError, as a plain dict
        self.asked.add(key)
        return self._tensor(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (this is that method)

    def pop(self, key: str, *default: Any) -> Any:
        value = self.get(key)
        super().pop(key, *default)
        return value if value is not None else default[0]

    def values(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        return (self._tensor(key) for key in self)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:  # type: ignore[override]
        return ((key, self._tensor(key)) for key in self)

    def _tensor(self, key: str) -> torch.Tensor:
        info = self._source.tensors[key]
        if key in self._shapes:
            return torch.empty(self._shapes[key], dtype=torch.bfloat16, device="meta")
        if info.nbytes <= _SMALL_BYTES:
            return self._source.read(key)
        return torch.empty(info.shape, dtype=CODE_TO_TORCH.get(info.dtype, torch.uint8), device="meta")


@dataclass(frozen=True, slots=True)
class Detection:
    """model: ComfyUI's name of the architecture, None when it knows none. config: what it would build from.

    fixed: names of the layers whose weight's shape was read.
    """

    model: str | None
    config: dict[str, Any] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()


def detect(path: Path, *, decoded: bool = False) -> Detection:
    """A diffusion model, or a checkpoint with one, or else a text encoder. Reads the header and small tensors.

    decoded: as if every quantized layer were decoded; that tells what a file is in which layers are packed that
    ComfyUI looks at. Raises InputFileError then: a layer that cannot be decoded.
    """
    with open_source(path) as source:
        shapes = (
            {f"{layer}.weight": stored.shape for layer, stored in stored_layers(source).items()} if decoded else {}
        )
        return _detect_diffusion(source, shapes) or _detect_text_encoder(source, shapes) or Detection(None)


def checkpoint_prefix(path: Path) -> str:
    """What ComfyUI takes for the prefix of the diffusion model's tensors in a full checkpoint."""
    from comfy import model_detection

    with open_source(path) as source:
        return model_detection.unet_prefix_from_state_dict(RecordingDict(source, {}))


def _detect_diffusion(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> Detection | None:
    from comfy import model_detection

    state = RecordingDict(source, shapes)
    prefix = model_detection.unet_prefix_from_state_dict(state)
    if not any(key.startswith(prefix) for key in state):
        prefix = ""
    config = model_detection.detect_unet_config(state, prefix, metadata=source.metadata)
    if config is None:
        return None
    plain = {key: str(value) for key, value in config.items()}
    match = model_detection.model_config_from_unet_config
    arguments = (dict(config), state, prefix)[: len(signature(match).parameters)]  # the prefix came later
    known = match(*arguments)
    if known is None:
        return None
    return Detection(type(known).__name__, plain, _fixed(state))


def _detect_text_encoder(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> Detection | None:
    import comfy.sd

    state = RecordingDict(source, shapes)
    kind = comfy.sd.detect_te_model(state)
    return None if kind is None else Detection(kind.name, {"text_encoder": kind.name}, _fixed(state))


def _fixed(state: RecordingDict) -> frozenset[str]:
    return frozenset(key.removesuffix(".weight") for key in state.asked if key.endswith(".weight"))


def require_same(before: Detection, path: Path) -> None:
    """VerificationError when ComfyUI would take the finished file for another model than the source."""
    after = detect(path)
    if (after.model, after.config) == (before.model, before.config):
        return
    changed = [
        f"{key}: {before.config.get(key)} became {after.config.get(key)}"
        for key in sorted(before.config.keys() | after.config.keys())
        if before.config.get(key) != after.config.get(key)
    ]
    raise VerificationError(
        f"ComfyUI would take the quantized file for {after.model}, the source is {before.model} "
        f"({'; '.join(changed[:4])}). Nothing was kept. Keep these layers with the keep field; layers that "
        "were packed before need an 8-bit fallback."
    )
