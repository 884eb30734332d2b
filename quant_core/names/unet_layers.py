"""The layers of a Stable Diffusion UNet (SD 1 and 2, SDXL) under the names of its own code and of diffusers.

Its own code counts all blocks in a row, a downsampler included; diffusers counts levels, and blocks in a level.
Source: the module names of the published checkpoints in both layouts.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BESIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_OWN = re.compile(r"^(input|output|middle)_blocks?\.(\d+)\.(?:(\d+)\.)?(.+)$")
_THEIRS = re.compile(r"^(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)$")
_DOWN = re.compile(r"^input_blocks\.(\d+)\.0\.op$")
_BLOCKS = 2  # in a level, of every model that was published whole; distilled ones have one


def unet_names(own: Collection[str]) -> dict[str, str]:
    """{layer: its name in the other layout}, both ways; empty for other models. own: a model's layers, no prefix."""
    if any(name.startswith(("input_blocks.", "middle_block.")) for name in own):
        downs = [int(match[1]) for match in map(_DOWN.match, own) if match]
        blocks = min(downs) - 1 if downs else _BLOCKS
        names = {name: _to_diffusers(name, blocks) for name in own}
    elif any(name.startswith(("down_blocks.", "mid_block.")) for name in own):
        found = [match.groups() for match in map(_THEIRS.match, own) if match]
        resnets = [int(i) for side, _, kind, i, _ in found if (side, kind) == ("down", "resnets")]
        attending = {level for side, level, kind, _, _ in found if (side, kind) == ("up", "attentions")}
        names = {name: _from_diffusers(name, 1 + max(resnets, default=_BLOCKS - 1), attending) for name in own}
    else:
        return {}
    return {name: other for name, other in names.items() if other}


def _to_diffusers(name: str, blocks: int) -> str | None:
    if name in _BESIDE:
        return _BESIDE[name]
    match = _OWN.match(name)
    if match is None:
        return None
    side, first, second, layer = match.groups()
    n, part = int(first), int(second or -1)
    if side == "middle":
        return _inside("mid_block", n // 2 if n != 1 else 0, n == 1, f"{second}.{layer}" if second else layer)
    if second is None:
        return None
    level, i = divmod(n - 1, blocks + 1) if side == "input" else divmod(n, blocks + 1)
    block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if layer == "op" and side == "input":
        return f"{block}.downsamplers.0.conv"
    if layer == "conv" and side == "output":
        return f"{block}.upsamplers.0.conv"
    return _inside(block, i, part == 1, layer)


def _inside(block: str, i: int, attention: bool, layer: str) -> str | None:
    if attention:
        return f"{block}.attentions.{i}.{layer}"
    return f"{block}.resnets.{i}.{_RESNET[layer]}" if layer in _RESNET else None


def _from_diffusers(name: str, blocks: int, attending: Collection[str]) -> str | None:
    """attending: the levels on the way up that have attention; their upsamplers stand behind it."""
    beside = next((own for own, theirs in _BESIDE.items() if theirs == name), None)
    match = _THEIRS.match(name)
    if beside or match is None:
        return beside
    side, level, kind, i, layer = match.groups()
    if kind == "resnets":
        layer = next((own for own, theirs in _RESNET.items() if theirs == layer), None)
        if layer is None:
            return None
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}.{layer}"
    start = (blocks + 1) * int(level) + (side == "down")
    if kind == "downsamplers":
        return f"input_blocks.{start + blocks}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{start + blocks}.{2 if level in attending else 1}.conv"
    return f"{'input' if side == 'down' else 'output'}_blocks.{start + int(i)}.{int(kind == 'attentions')}.{layer}"
