"""LoRAs of every kind and naming, baked; and LoRAs that are damaged, refused in a sentence. No ComfyUI is needed.

That the sums are those of ComfyUI, for every name that it knows, is what tests/comfy/test_lora.py checks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves the folder of the tests out
from comfyui_quantpress.quant_core.checkpoint.source import open_source  # noqa: E402
from comfyui_quantpress.quant_core.errors import PlanError, QuantPressError  # noqa: E402
from comfyui_quantpress.quant_core.names.prefixes import MODEL_PREFIX  # noqa: E402
from comfyui_quantpress.quant_core.tools.lora import bake  # noqa: E402
from comfyui_quantpress.quant_core.tools.rewrite import Rewrite  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

RANK = 4
generator = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator) * 0.1


def planned(
    folder: Path, model: dict[str, Tensor], lora: dict[str, Tensor], strength: float = 1.0, **options
) -> Rewrite:
    save_file(model, folder / "model.safetensors")
    save_file(lora, folder / "lora.safetensors")
    with open_source(folder / "model.safetensors") as src, open_source(folder / "lora.safetensors") as one:
        rewrite = bake(src, [(one, strength)], **options)
        rewrite.apply(folder / "baked.safetensors", overwrite=True)
    return rewrite


def baked(folder: Path, model: dict[str, Tensor], lora: dict[str, Tensor], strength: float = 1.0, **options):
    planned(folder, model, lora, strength, **options)
    return load_file(folder / "baked.safetensors")


def pair(base: str, n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    """A LoRA of a layer, and its change."""
    down, up = randn(RANK, k), randn(n, RANK)
    return {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}, up @ down


def close(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one.float(), other.float(), atol=1e-6))


# --- the reports ---------------------------------------------------------------------------------------------------


def test_a_layer_of_rank_0_changes_nothing_and_is_noted(tmp_path):
    """https://github.com/huggingface/peft/issues/1539"""
    model = {"blocks.0.attn.q.weight": randn(64, 64), "blocks.0.attn.k.weight": randn(64, 64)}
    lora, change = pair("diffusion_model.blocks.0.attn.k", 64, 64)
    lora["diffusion_model.blocks.0.attn.q.lora_A.weight"] = torch.zeros(0, 64)
    lora["diffusion_model.blocks.0.attn.q.lora_B.weight"] = torch.zeros(64, 0)
    lora["diffusion_model.blocks.0.attn.q.alpha"] = torch.tensor(4.0)
    rewrite = planned(tmp_path, model, lora)
    result = load_file(tmp_path / "baked.safetensors")
    assert torch.equal(result["blocks.0.attn.q.weight"], model["blocks.0.attn.q.weight"])
    assert close(result["blocks.0.attn.k.weight"], model["blocks.0.attn.k.weight"] + change)
    assert any("1 layer has rank 0 and changes nothing: diffusion_model.blocks.0.attn.q" in n for n in rewrite.notes)


def test_a_lora_of_rank_0_alone_is_an_error_and_no_traceback(tmp_path):
    lora = {"blocks.0.lora_A.weight": torch.zeros(0, 8), "blocks.0.lora_B.weight": torch.zeros(8, 0)}
    with pytest.raises(PlanError, match="nothing in it changes a layer"):
        planned(tmp_path, {"blocks.0.weight": randn(8, 8)}, lora)


SDXL = [  # (layer in ComfyUI's files, in diffusers)
    ("input_blocks.0.0", "conv_in"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("input_blocks.1.0.in_layers.2", "down_blocks.0.resnets.0.conv1"),
    ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
    ("input_blocks.4.1.proj_in", "down_blocks.1.attentions.0.proj_in"),
    (
        "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj",
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
    ),
    ("middle_block.0.emb_layers.1", "mid_block.resnets.0.time_emb_proj"),
    ("middle_block.1.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
    ("middle_block.2.out_layers.3", "mid_block.resnets.1.conv2"),
    (
        "output_blocks.0.1.transformer_blocks.0.attn2.to_out.0",
        "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    ),
    ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
    ("output_blocks.7.0.skip_connection", "up_blocks.2.resnets.1.conv_shortcut"),
    ("out.2", "conv_out"),
]
UNET_STYLES = {
    "kohya": lambda base: (
        f"lora_unet_{base.replace('.', '_')}.lora_down.weight",
        f"lora_unet_{base.replace('.', '_')}.lora_up.weight",
    ),
    "lycoris": lambda base: (
        f"lycoris_{base.replace('.', '_')}.lora_down.weight",
        f"lycoris_{base.replace('.', '_')}.lora_up.weight",
    ),
    "peft": lambda base: (f"unet.{base}.lora_A.weight", f"unet.{base}.lora_B.weight"),
    "bare peft": lambda base: (
        f"base_model.model.{base}.lora_A.default.weight",
        f"base_model.model.{base}.lora_B.default.weight",
    ),
    "old diffusers": lambda base: (
        f"unet.{base.replace('.to_', '.processor.to_').removesuffix('.0')}_lora.down.weight",
        f"unet.{base.replace('.to_', '.processor.to_').removesuffix('.0')}_lora.up.weight",
    ),
}


@pytest.mark.parametrize("style", UNET_STYLES)
@pytest.mark.parametrize("prefix", ["", MODEL_PREFIX])
def test_sdxl_takes_loras_under_diffusers_names(tmp_path, style, prefix):
    """https://github.com/bmaltais/kohya_ss/issues/3000"""
    model = {f"{prefix}{own}.weight": randn(16, 8) for own, _ in SDXL} | {
        "first_stage_model.conv_in.weight": randn(16, 8)
    }
    lora, expected = {}, dict(model)
    for own, theirs in SDXL:
        if style == "old diffusers" and ".to_" not in theirs:
            continue
        down, up = randn(RANK, 8), randn(16, RANK)
        lora |= dict(zip(UNET_STYLES[style](theirs), (down, up), strict=True))
        expected[f"{prefix}{own}.weight"] = model[f"{prefix}{own}.weight"] + 0.5 * (up @ down)
    result = baked(tmp_path, model, lora, 0.5)
    assert all(close(result[name], tensor) for name, tensor in expected.items())


def test_a_few_layers_of_sdxl_are_enough_to_know_its_names(tmp_path):
    """No downsampler tells how many blocks a level has: it is two."""
    own = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    lora, change = pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 64, 64)
    model = {own: randn(64, 64)}
    assert close(baked(tmp_path, model, lora)[own], model[own] + change)


def test_a_unet_under_diffusers_names_takes_loras_under_its_own(tmp_path):
    model = {f"{theirs}.weight": randn(16, 8) for _, theirs in SDXL} | {
        "down_blocks.0.resnets.1.conv1.weight": randn(16, 8)
    }
    lora, changes = {}, {}
    for own, theirs in SDXL:
        tensors, changes[f"{theirs}.weight"] = pair(f"lora_unet_{own.replace('.', '_')}", 16, 8)
        lora |= tensors
    result = baked(tmp_path, model, lora)
    assert all(close(result[name], model[name] + change) for name, change in changes.items())


def test_differences_are_added_to_weights_of_any_rank_and_to_biases(tmp_path):
    """https://github.com/kijai/ComfyUI-WanVideoWrapper/issues/940"""
    model = {
        "blocks.0.self_attn.q.weight": randn(64, 64),
        "blocks.0.self_attn.q.bias": randn(64).bfloat16(),
        "blocks.0.self_attn.norm_q.weight": randn(64),
        "blocks.0.modulation": randn(1, 6, 64),
        "patch_embedding.weight": randn(8, 4, 1, 2, 2),
    }
    b = "diffusion_model."
    lora, change = pair(b + "blocks.0.self_attn.q", 64, 64)
    whole = {
        b + "blocks.0.self_attn.q.diff_b": (64,),
        b + "blocks.0.self_attn.norm_q.diff": (64,),
        b + "blocks.0.modulation.diff": (1, 6, 64),
        b + "patch_embedding.diff": (8, 4, 1, 2, 2),
    }
    lora |= {name: randn(*shape) for name, shape in whole.items()}
    rewrite = planned(tmp_path, model, lora, 0.5)
    result = load_file(tmp_path / "baked.safetensors")
    assert close(result["blocks.0.self_attn.q.weight"], model["blocks.0.self_attn.q.weight"] + 0.5 * change)
    for name, key in zip(list(model)[1:], whole, strict=True):
        expected = (model[name].float() + 0.5 * lora[key]).to(model[name].dtype)
        assert torch.equal(result[name], expected), name
    assert any("4 weights and 1 bias changed" in note for note in rewrite.notes)


# --- names ---------------------------------------------------------------------------------------------------------

Q, K, V = (slice(i * 8, (i + 1) * 8) for i in range(3))
ALL = slice(None)
NAMES = [  # (layer in the model's file, shape, LoRA's name, rows)
    ("layers.3.attention.qkv", (24, 8), "diffusion_model.layers.3.attention.to_k", K),
    ("noise_refiner.0.attention.qkv", (24, 8), "transformer.noise_refiner.0.attention.to_v", V),
    ("layers.3.attention.out", (8, 8), "lora_unet_layers_3_attention_to_out_0", ALL),
    ("layers.3.attention.qkv", (16, 8), "transformer.layers.3.attention.to_k", slice(8, 12)),  # grouped queries
    ("layers.3.attention.qkv", (16, 8), "transformer.layers.3.attention.to_v", slice(12, 16)),
    (
        "single_blocks.2.linear1",
        (72, 8),
        "transformer.single_transformer_blocks.2.attn.to_qkv_mlp_proj",
        ALL,
    ),  # Flux 2
    ("single_blocks.2.linear1", (56, 8), "single_blocks.2.linear1_qkv", slice(0, 24)),
    ("double_blocks.0.txt_mlp.0", (8, 8), "lycoris_transformer_blocks_0_ff_context_linear_in", ALL),
    ("double_blocks.0.img_attn.norm.query_norm", (8,), "transformer.transformer_blocks.0.attn.norm_q", ALL),
    ("blocks.1.attn.wo", (8, 8), "diffusion_model.transformer_blocks.1.attn.to_out", ALL),  # Krea 2
    ("txtfusion.refiner_blocks.0.mlp.gate", (8, 8), "text_fusion.refiner_blocks.0.ff.gate", ALL),
    ("blocks.5.attn.qkv", (24, 8), "base_model.model.transformer_blocks.5.attn1.to_k", K),  # PixArt
    ("blocks.5.cross_attn.kv_linear", (16, 8), "transformer.transformer_blocks.5.attn2.to_v", slice(8, 16)),
    ("double_layers.0.attn.w1q", (8, 8), "transformer.joint_transformer_blocks.0.attn.add_q_proj", ALL),
    ("joint_blocks.1.x_block.attn2.qkv", (24, 8), "lora_transformer_transformer_blocks_1_attn2_to_q", Q),
    ("double_blocks.0.img_attn_qkv", (24, 8), "diffusion_model.double_blocks.0.img_attn.qkv", ALL),  # Hunyuan Video
    ("double_blocks.0.txt_attn_proj", (8, 8), "transformer.double_blocks.0.txt_attn_proj", ALL),
    ("single_blocks.1.modulation.linear", (8, 8), "diffusion_model.single_blocks.1.modulation.lin", ALL),
    ("double_blocks.0.img_mlp.0", (8, 8), "transformer.double_blocks.0.img_mlp.fc1", ALL),
    ("decoder.layers.0.self_attn.q_proj", (8, 8), "base_model.model.layers.0.self_attn.q_proj", ALL),  # ACE-Step 1.5
    ("blocks.0.cross_attn.k", (8, 8), "lora_unet__blocks_0_cross_attn_k", ALL),  # Wan Fun
    ("blocks.0.cross_attn.k", (8, 8), "lycoris_blocks_0_cross_attn_k", ALL),
    ("transformer_blocks.0.attn1.to_q", (8, 8), "transformer_blocks.0.attn1.to_q", ALL),  # LTX-Video
    ("down_blocks.0.attn.to_out.0", (8, 8), "lora_prior_unet_down_blocks_0_attn_to_out_0", ALL),
]


@pytest.mark.parametrize(("own", "shape", "name", "rows"), NAMES)
@pytest.mark.parametrize("prefix", ["", MODEL_PREFIX, "model.", "net."])
def test_names_of_many_families(tmp_path, own, shape, name, rows, prefix):
    whole = torch.zeros(*shape)
    change = randn(*whole[rows].shape)
    model = {f"{prefix}{own}.weight": whole}
    result = baked(tmp_path, model, {f"{name}.diff": change})[f"{prefix}{own}.weight"]
    whole = whole.clone()
    whole[rows] = change
    assert torch.equal(result, whole)


def test_norms_that_comfyui_renames_are_found_by_either_name(tmp_path):
    model = {f"double_blocks.0.img_attn.norm.{name}_norm.scale": torch.ones(8) for name in ("query", "key")}
    lora = {
        "transformer.transformer_blocks.0.attn.norm_q.diff": torch.ones(8),
        "diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale.diff": torch.ones(8),
    }
    assert all(torch.equal(tensor, torch.full((8,), 2.0)) for tensor in baked(tmp_path, model, lora).values())


def test_the_last_modulation_has_scale_and_shift_exchanged(tmp_path):
    model = {
        "double_blocks.0.img_attn.qkv.weight": randn(24, 8),
        "final_layer.adaLN_modulation.1.weight": randn(16, 8),
    }
    theirs, change = pair("transformer.norm_out.linear", 16, 8)
    ours, other = pair("diffusion_model.final_layer.adaLN_modulation.1", 16, 8)
    name = "final_layer.adaLN_modulation.1.weight"
    assert close(baked(tmp_path, model, theirs)[name], model[name] + torch.cat([change[8:], change[:8]]))
    assert close(baked(tmp_path, model, ours)[name], model[name] + other)


# --- kinds ---------------------------------------------------------------------------------------------------------


def test_the_kronecker_product_of_a_convolution_in_factors(tmp_path):
    w1, t2, a, b = randn(2, 2), randn(3, 3, 3, 3), randn(3, 4), randn(3, 4)
    lora = {
        "conv.lokr_w1": w1,
        "conv.lokr_t2": t2,
        "conv.lokr_w2_a": a,
        "conv.lokr_w2_b": b,
        "conv.alpha": torch.tensor(6.0),
    }
    w2 = torch.einsum("ijhw,in,jk->nkhw", t2, a, b)
    change = torch.stack([torch.stack([torch.kron(w1, w2[:, :, y, x]) for x in range(3)], -1) for y in range(3)], -2)
    model = {"conv.weight": randn(8, 8, 3, 3)}
    assert close(baked(tmp_path, model, lora, 0.5)["conv.weight"], model["conv.weight"] + 0.5 * 2 * change)


def test_a_magnitude_per_row_scales_the_rows(tmp_path):
    model = {"a.weight": randn(8, 16)}
    lora, change = pair("a", 8, 16)
    lora["a.dora_scale"] = randn(8, 1).abs() + 1
    norms = model["a.weight"].norm(dim=1, keepdim=True)
    expected = (model["a.weight"] + change) * lora["a.dora_scale"] / norms
    assert torch.allclose(baked(tmp_path, model, lora)["a.weight"], expected, rtol=1e-4)
    half = baked(tmp_path, model, lora, 0.5)["a.weight"]
    assert torch.allclose(half, (model["a.weight"] + expected) / 2, rtol=1e-4, atol=1e-6)


def test_a_rotation_keeps_the_length_of_every_column(tmp_path):
    model = {"a.weight": randn(12, 16)}
    result = baked(tmp_path, model, {"a.oft_blocks": randn(3, 4, 4)})["a.weight"]
    assert torch.allclose(result.norm(dim=0), model["a.weight"].norm(dim=0), rtol=1e-5)
    assert not close(result, model["a.weight"])
    result = baked(tmp_path, {"a.weight": randn(16, 16)}, {"a.oft_blocks": randn(2, 4, 4, 4)})["a.weight"]
    assert torch.isfinite(result).all()


def test_factors_in_fp8_are_read(tmp_path):
    model = {"a.weight": randn(8, 16)}
    lora, _ = pair("a", 8, 16)
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in lora.items()}
    down, up = (small[f"a.lora_{end}.weight"].float() for end in ("down", "up"))
    assert close(baked(tmp_path, model, small)["a.weight"], model["a.weight"] + up @ down)


def test_where_a_layer_has_several_kinds_the_one_that_comfyui_takes_counts(tmp_path):
    model = {"a.weight": torch.zeros(8, 16)}
    lora, _ = pair("a", 8, 16)
    rewrite = planned(tmp_path, model, lora | {"a.diff": torch.ones(8, 16)})
    assert torch.equal(load_file(tmp_path / "baked.safetensors")["a.weight"], torch.ones(8, 16))
    assert any("several kinds of change" in note for note in rewrite.notes)


def test_an_alpha_alone_changes_nothing(tmp_path):
    lora, change = pair("a", 8, 16)
    model = {"a.weight": randn(8, 16), "b.weight": randn(8, 8)}
    result = baked(tmp_path, model, lora | {"b.alpha": torch.tensor(2.0)})
    assert close(result["a.weight"], model["a.weight"] + change) and torch.equal(result["b.weight"], model["b.weight"])


def test_a_widened_input_has_its_new_shape_in_the_file(tmp_path):
    lora = {
        "img_in.lora_up.weight": randn(8, RANK),
        "img_in.lora_down.weight": randn(RANK, 12),
        "img_in.reshape_weight": torch.tensor([8, 12]),
    }
    model = {"img_in.weight": randn(8, 6)}
    result = baked(tmp_path, model, lora)["img_in.weight"]
    change = lora["img_in.lora_up.weight"] @ lora["img_in.lora_down.weight"]
    assert close(result, torch.nn.functional.pad(model["img_in.weight"], (0, 6)) + change)


# --- errors --------------------------------------------------------------------------------------------------------

NAN = torch.full((RANK, 16), float("nan"))
DAMAGED = [  # (tensors in place of those of a LoRA of a, what the error says)
    ({"a.alpha": torch.tensor([1.0, 2.0])}, r"a.alpha has the shape \[2\]; an alpha is one number"),
    ({"a.alpha": torch.tensor(float("nan"))}, "a.alpha is nan"),
    ({"a.lora_down.weight": torch.tensor(1.0)}, r"a.lora_down.weight has the shape \[\]; a factor has two dimensions"),
    ({"a.lora_up.weight": randn(8)}, r"a.lora_up.weight has the shape \[8\]"),
    ({"a.lora_down.weight": NAN}, "a.lora_down.weight holds NaN or Inf. The file is damaged"),
    ({"a.lora_down.weight": randn(RANK, 15)}, r"down \[4, 15\] and up \[8, 4\] do not make a \[8, 16\] change"),
    ({"a.lora_down.weight": randn(RANK + 1, 16)}, "do not make"),
    (
        {"a.lora_down.weight": torch.ones(RANK, 16, dtype=torch.int8)},
        "a.lora_down.weight is I8, no floating-point tensor",
    ),
    ({"a.lora_mid.weight": randn(RANK, 3, 1, 1)}, r"mid \[4, 3, 1, 1\]"),
    ({"a.dora_scale": randn(5, 1)}, r"a.dora_scale has the shape \[5, 1\]; a weight \[8, 16\] needs one number"),
    ({"a.dora_scale": torch.tensor(1.0)}, r"a.dora_scale has the shape \[\]"),
    ({"a.reshape_weight": torch.tensor([8])}, r"asks for the shape \[8\]; the model's is \[8, 16\]"),
    ({"a.reshape_weight": torch.tensor([float("nan"), 16])}, r"asks for the shape \[0, 16\]"),
    (
        {"b.lokr_w1": randn(2, 2), "b.lokr_w2": randn(3, 4)},
        r"w1 \[2, 2\] and w2 \[3, 4\] do not make a \[8, 8\] change",
    ),
    ({"b.lokr_w1_a": randn(2, 2), "b.lokr_w1_b": randn(3, 2), "b.lokr_w2": randn(4, 4)}, "do not make"),
    ({"b.lokr_w2": randn(4, 4)}, "b: no w1_a factor of a LoKr"),
    ({f"b.hada_w{i}_{x}": randn(8, 8) for i in (1, 2) for x in "ab"} | {"b.hada_t1": randn(8, 8)}, "do not make"),
    ({"b.oft_blocks": randn(3, 4, 4)}, r"oft_blocks \[3, 4, 4\] does not make a \[8, 8\] change"),
    ({"b.oft_blocks": randn(4, 4)}, "does not make"),
    ({"b.oft_blocks": randn(2, 4, 4), "b.dora_scale": randn(8, 1)}, "b.dora_scale does not go with a OFT"),
    ({"b.diff": randn(8, 9)}, r"diff \[8, 9\] does not make a \[8, 8\] change"),
    ({"b.diff_b": randn(8)}, r"1 layer is not in model.safetensors: b \(its bias\)"),
    ({"b.lora_B.bias": randn(8)}, "not in model.safetensors|without a lora_A"),
    ({"b.lora_magnitude_vector.weight": randn(8)}, "a form of LoRA that ComfyUI cannot read. Merge it with the tool"),
    ({"b.oft_R.weight": randn(2, 6)}, "a form of OFT that ComfyUI cannot read"),
    ({"b.on_input": torch.tensor(True)}, "a form of IA3"),
    (
        {"b.nonsense": randn(8)},
        "1 tensor is no part of a LoRA that is known: b.nonsense. Give a LoRA of this model; where",
    ),
    ({"scalar.lora_up.weight": randn(1, 1), "scalar.lora_down.weight": randn(1, 1)}, "is one number"),
]


@pytest.mark.parametrize(("tensors", "message"), DAMAGED)
def test_what_is_damaged_or_does_not_fit_is_named(tmp_path, tensors, message):
    model = {"a.weight": randn(8, 16), "b.weight": randn(8, 8), "scalar": torch.tensor(1.0)}
    lora, _ = pair("a", 8, 16)
    with pytest.raises(PlanError, match=message) as caught:
        planned(tmp_path, model, lora | tensors)
    assert "lora.safetensors: " in str(caught.value) and len(caught.value.problems) == 1
    assert not (tmp_path / "baked.safetensors").exists()


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_is_a_number(tmp_path, strength):
    with pytest.raises(PlanError, match="the strength is"):
        planned(tmp_path, {"a.weight": randn(8, 16)}, pair("a", 8, 16)[0], strength)


def test_all_that_is_wrong_is_said_at_once_and_long_lists_are_short(tmp_path):
    model = {f"{i}.weight": randn(8, 8) for i in range(20)}
    lora = {f"{i}.diff": randn(8, 9) for i in range(20)} | {"elsewhere.diff": randn(3), "x": randn(3)}
    with pytest.raises(PlanError) as caught:
        planned(tmp_path, model, lora)
    text = [str(problem) for problem in caught.value.problems]
    assert sum("does not make" in line for line in text) == 8 and "12 more of its changes" in text[-1]
    assert any("elsewhere" in line and "Model from Graph" in line for line in text)
    with pytest.raises(PlanError):
        planned(tmp_path, model, lora, skip_unmatched=True)  # what does not fit is no stranger


def test_strangers_can_be_left_out(tmp_path):
    model = {"a.weight": randn(8, 16)}
    lora, change = pair("a", 8, 16)
    strange = {"b.diff": randn(8), "a.diff_b": randn(8), "c.nonsense": randn(3)}
    rewrite = planned(tmp_path, model, lora | strange, skip_unmatched=True)
    assert close(load_file(tmp_path / "baked.safetensors")["a.weight"], model["a.weight"] + change)
    notes = " ".join(rewrite.notes)
    assert "2 layers are not in" in notes and "a (its bias)" in notes and "c.nonsense" in notes


def test_a_text_encoder_takes_its_own_part_where_it_is_the_model(tmp_path):
    name = "text_model.encoder.layers.0.mlp.fc1"
    lora, change = pair(f"lora_te_{name.replace('.', '_')}", 8, 8)
    model = {f"{name}.weight": randn(8, 8)}
    assert close(baked(tmp_path, model, lora)[f"{name}.weight"], model[f"{name}.weight"] + change)


PARTS = [
    "lora_down.weight",
    "lora_up.weight",
    "lora_mid.weight",
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "alpha",
    "dora_scale",
    "reshape_weight",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "a1.weight",
    "a2.weight",
    "b1.weight",
    "b2.weight",
    "oft_blocks",
    "rescale",
    "diff",
    "diff_b",
    "set_weight",
    "w_norm",
    "b_norm",
    "weight",
    "on_input",
]
SIZES = st.sampled_from([0, 1, 2, 4])
TENSORS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(SIZES, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool]),
    st.sampled_from([1.0, 0.0, -2.0, float("nan")]),
)
NAMES_OF_ALL = (
    "matrix",
    "vector",
    "conv",
    "scalar",
    "double_blocks.0.img_attn.qkv",
    "transformer.transformer_blocks.0.attn.to_k",
    "final_layer.adaLN_modulation.1",
    "transformer.norm_out.linear",
    "bare",
    "nowhere",
)


@given(
    st.dictionaries(
        st.builds("{}.{}".format, st.sampled_from(NAMES_OF_ALL), st.sampled_from(PARTS)),
        TENSORS,
        min_size=1,
        max_size=9,
    ),
    st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_no_lora_ends_in_a_traceback(tmp_path_factory, lora, skip):
    model = {
        "matrix.weight": torch.ones(4, 4),
        "matrix.bias": torch.ones(4),
        "vector.weight": torch.ones(4),
        "conv.weight": torch.ones(4, 2, 1, 2),
        "scalar": torch.tensor(1.0),
        "bare": torch.ones(1, 2, 4),
        "double_blocks.0.img_attn.qkv.weight": torch.ones(12, 4),
        "final_layer.adaLN_modulation.1.weight": torch.ones(8, 4),
    }
    try:
        planned(tmp_path_factory.mktemp("lora"), model, lora, 0.5, skip_unmatched=skip)
    except QuantPressError as err:
        assert len(str(err)) > 20
