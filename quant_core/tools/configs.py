"""Writing layer configs into a draft: the comfy_quant tensors and the header, always together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from ..checkpoint.header import load_json_object
from ..checkpoint.metadata import CONFIG_SUFFIX, FORMAT_VERSION, HEADER_KEY, Config, encode_config, same_json
from ..errors import InputFileError
from .rewrite import Copy, Draft


class HeaderMode(Enum):
    """What becomes of the header's copy of the configs."""

    KEEP = "updated where the file has one"
    BUILD = "written for every layer"
    DROP = "removed"


def write_configs(
    draft: Draft,
    configs: Mapping[str, Config | None],
    header: HeaderMode = HeaderMode.KEEP,
    others: Mapping[str, Config] | None = None,
    *,
    complete: bool = True,
) -> None:
    """Put configs into the draft. None removes a layer's. A tensor or a header that says the same already stays.

    configs: by the layers' names in the draft. others: the rest of the quantized layers, for HeaderMode.BUILD.
    complete: see encode_config.
    """
    for layer, config in configs.items():
        name = layer + CONFIG_SUFFIX
        if config is None:
            if name in draft:
                draft.drop(name)
        elif not _says(draft, name, config):
            draft.put(
                name,
                encode_config(config, complete=complete),
                after=f"{layer}.weight",
                of=(name,) if name in draft else (),
            )
    text = draft.metadata.get(HEADER_KEY)
    if header is HeaderMode.DROP:
        draft.metadata.pop(HEADER_KEY, None)
    elif header is HeaderMode.BUILD:
        written = {**(others or {}), **configs}
        _set_header(draft, {layer: dict(config) for layer, config in written.items() if config is not None})
    elif text is not None:
        layers = header_object(text)["layers"]
        for layer, config in configs.items():
            if config is not None:
                layers[layer] = dict(config)
            else:
                layers.pop(layer, None)
        _set_header(draft, layers)


def _says(draft: Draft, name: str, config: Config) -> bool:
    """Whether the tensor holds this object; other separators or key order are as good, padding is not."""
    content = draft.content(name) if name in draft else None
    if not isinstance(content, Copy) or content.dtype != "U8" or len(content.shape) != 1:
        return False
    raw = content.src.read(content.name).numpy().tobytes()
    try:
        return same_json(load_json_object(raw, name), config)  # JSON ends before a NUL: refused there
    except InputFileError:
        return False


def _set_header(draft: Draft, layers: Mapping[str, object]) -> None:
    """Replace the header's layers; its other members, and the text when nothing differs, stay."""
    text = draft.metadata.get(HEADER_KEY)
    old = header_object(text) if text is not None else {}
    new = {"format_version": FORMAT_VERSION, **old, "layers": dict(layers)}
    if text is None or not same_json(old, new):
        draft.metadata[HEADER_KEY] = json.dumps(new, ensure_ascii=False)


def header_object(text: str) -> dict[str, Any]:
    """The header's JSON object with a `layers` object in it. Raises InputFileError."""
    content = load_json_object(text.encode("utf-8", "replace"), HEADER_KEY)
    if not isinstance(content.get("layers"), dict):
        raise InputFileError(f"{HEADER_KEY} has no `layers` object. Run `quantpress repair` on the file.")
    return content
