"""CONDITIONING of the size a model takes, without a text encoder: for comparing a model with its quantized form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...quant_core.checkpoint.source import open_source
from ...quant_core.errors import RequestError

# Attributes of the diffusion model whose Linear (or Sequential that begins with one) takes the text, by architecture.
_TEXT_INPUTS = (
    "context_embedder",
    "txt_in",
    "text_embedding",
    "cap_embedder",
    "y_proj",
    "caption_projection",
    "cond_proj",
)
# Keys of ComfyUI's model config that hold the text's width, for models whose input layer has none of these names.
_TEXT_KEYS = (
    "context_in_dim",
    "text_dim",
    "cap_feat_dim",
    "context_dim",
    "joint_attention_dim",
    "caption_channels",
    "crossattn_emb_channels",
    "cross_attention_dim",
)
_TOKENS = 64
KINDS = ("noise", "zeros", "demo shapes")
_DEMO_TABLE = Path(__file__).resolve().parents[2] / "assets" / "conditioning.safetensors"


def conditioning(model: Any, kind: str, seed: int) -> list[list[Any]]:
    """kind: one of KINDS. float32 text [1, tokens, width] with a pooled vector where the model takes one.

    RequestError where the width cannot be told: such a model needs its own text encoder.
    """
    width, pooled = text_width(model), pooled_width(model)
    if kind == "demo shapes":
        return _demo_class(seed, width, pooled)
    if kind == "zeros":
        text, vector = torch.zeros(1, _TOKENS, width), torch.zeros(1, pooled)
    else:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, _TOKENS, width, generator=generator)
        vector = torch.randn(1, pooled, generator=generator)
    return [[text, {"pooled_output": vector} if pooled else {}]]


def _demo_class(index: int, width: int, pooled: int) -> list[list[Any]]:
    """The trained demo model's own table in place of a text encoder: ten classes of shapes and colours."""
    with open_source(_DEMO_TABLE) as table:
        context, vectors = table.read("context").float(), table.read("pooled").float()
    if (width, pooled) != (context.shape[2], vectors.shape[1]):
        raise RequestError(
            "'demo shapes' fit the demo model only. Choose noise or zeros, or connect the model's own text encoder."
        )
    row = index % (context.shape[0] - 1)  # the last row is the null class
    return [[context[row : row + 1], {"pooled_output": vectors[row : row + 1]}]]


def text_width(model: Any) -> int:
    diffusion, config = model.model.diffusion_model, model.model.model_config.unet_config
    for name in _TEXT_INPUTS:
        width = _in_features(getattr(diffusion, name, None))
        if width:
            return width
    for key in _TEXT_KEYS:
        if isinstance(config.get(key), int):
            return config[key]
    raise RequestError(
        f"{type(model.model.model_config).__name__}: the width of its text input is not known to this node. "
        "Connect the model's own text encoder instead."
    )


def pooled_width(model: Any) -> int:
    """Width of the pooled text vector; 0 for models without one."""
    width = _in_features(getattr(model.model.diffusion_model, "y_embedder", None)) or _in_features(
        getattr(model.model.diffusion_model, "vector_in", None)
    )
    return int(width or getattr(model.model, "adm_channels", 0) or 0)


def _in_features(module: Any) -> int | None:
    """in_features of a Linear, or of the first one inside a small module."""
    if module is None:
        return None
    for part in module.modules():
        if isinstance(getattr(part, "in_features", None), int):
            return part.in_features
    return None
