"""The model behind what wrappers and checkpoints put before and into its names."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_quantpress.quant_core.checkpoint.metadata import HEADER_KEY
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import RequestError
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.pipeline.request import Request
from comfyui_quantpress.quant_core.pipeline.run import convert
from comfyui_quantpress.quant_core.policy.architectures import architectures
from comfyui_quantpress.quant_core.policy.general import Policy
from comfyui_quantpress.quant_core.policy.recipe import parse_recipe
from comfyui_quantpress.quant_core.tools.merge import extract
from known_models import state_of
from safetensors.torch import load_file, save_file
from tool_files import assert_untouched

FLUX = next(known for known in architectures() if known.id == "flux")


def flux_file(path):
    shapes = state_of(FLUX, 2, "", 64)
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.model.diffusion_model.{name}",
        lambda name: f"model.diffusion_model.model.diffusion_model.{name}",
        lambda name: f"denoiser.inner.{name}",
        lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
        lambda name: f"model.diffusion_model.{name}".replace("blocks.1.", "blocks.1._orig_mod."),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_extract_takes_off_what_wrappers_put_into_names(wrap, quantized, tmp_path):
    """Scales, descriptions and the header's entries follow."""
    plain = flux_file(tmp_path / "plain.safetensors")
    if quantized:
        recipe = parse_recipe(get_format("int8_rowwise"))
        convert(Request(plain, tmp_path / "q.safetensors", recipe, Policy()))
        plain = tmp_path / "q.safetensors"
    with open_source(plain) as src:
        layers, metadata = {}, dict(src.metadata)
        if quantized:
            layers = json.loads(metadata[HEADER_KEY])["layers"]
            wrapped_layers = {wrap(f"{layer}.x").removesuffix(".x"): config for layer, config in layers.items()}
            metadata[HEADER_KEY] = json.dumps({"format_version": "1.0", "layers": wrapped_layers})
    save_file({wrap(name): t for name, t in load_file(plain).items()}, tmp_path / "wrapped.safetensors", metadata)
    with open_source(tmp_path / "wrapped.safetensors") as src:
        extract(src).apply(tmp_path / "out.safetensors")
    assert_untouched(plain, tmp_path / "out.safetensors", header=set(metadata))
    with open_source(tmp_path / "out.safetensors") as src:
        assert json.loads(src.metadata.get(HEADER_KEY, '{"layers": {}}'))["layers"] == layers


def test_names_that_differ_only_in_wrappers_are_an_error(tmp_path):
    plain = load_file(flux_file(tmp_path / "plain.safetensors"))
    wrapped = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor.clone() for name, tensor in plain.items()}
    save_file(plain | wrapped, tmp_path / "twice.safetensors")
    with (
        open_source(tmp_path / "twice.safetensors") as src,
        pytest.raises(
            RequestError, match=r"double_blocks\.0\._orig_mod\..* and double_blocks\.0\.\w.* would both be called"
        ),
    ):
        extract(src)
