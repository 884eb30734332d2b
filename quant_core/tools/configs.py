"""Writing layer configs into a draft: the comfy_quant tensors and the header, always together."""
from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum

from ..checkpoint.header import load_json_object
from ..checkpoint.metadata import CONFIG_SUFFIX, FORMAT_VERSION, HEADER_KEY, Config, encode_config
from ..errors import InputFileError
from .rewrite import Draft


class HeaderMode(Enum):
    """What becomes of the header's copy of the configs."""

    KEEP = "updated where the file has one"
    BUILD = "written for every layer"
    DROP = "removed"


def write_configs(draft: Draft, changed: Mapping[str, Config | None], all_layers: Mapping[str, Config],
                  header: HeaderMode = HeaderMode.KEEP) -> None:
    """Put new configs into the draft. None removes a layer's.

    changed: by the layers' names in the draft; their comfy_quant tensors are written, all others stay as they are.
    all_layers: every quantized layer of the new file with its config, for HeaderMode.BUILD. A header that says the same
    already keeps its very text.
    """
    for layer, config in changed.items():
        name = layer + CONFIG_SUFFIX
        if config is not None:
            draft.put(name, encode_config(config), after=f"{layer}.weight", of=(name,) if name in draft else ())
        elif name in draft:
            draft.drop(name)
    text = draft.metadata.get(HEADER_KEY)
    if header is HeaderMode.DROP:
        draft.metadata.pop(HEADER_KEY, None)
    elif header is HeaderMode.BUILD:
        _set_header(draft, {layer: dict(config) for layer, config in all_layers.items()})
    elif text is not None:
        layers = header_object(text)["layers"]
        for layer, config in changed.items():
            if config is not None:
                layers[layer] = dict(config)
            else:
                layers.pop(layer, None)
        _set_header(draft, layers)


def _set_header(draft: Draft, layers: Mapping[str, object]) -> None:
    """Replace the header's layers; its other members, and the text when nothing differs, stay."""
    text = draft.metadata.get(HEADER_KEY)
    old: dict[str, object] = {}
    if text is not None:
        try:
            old = header_object(text)
        except InputFileError:                           # unreadable: it is built anew, and repair says so
            old = {}
    new = {"format_version": FORMAT_VERSION, **old, "layers": dict(layers)}
    if old != new or _dump(old["layers"]) != _dump(new["layers"]):
        draft.metadata[HEADER_KEY] = _dump(new)


def header_object(text: str) -> dict[str, object]:
    """The header's JSON object with a `layers` object in it. Raises InputFileError."""
    content = load_json_object(text.encode("utf-8", "replace"), HEADER_KEY)
    if not isinstance(content.get("layers"), dict):
        raise InputFileError(f"{HEADER_KEY} has no `layers` object. Run `quantpress repair` on the file.")
    return content


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


