"""LoRA names of every convention lead to the model's own layers; other adapters are refused by name."""

import pytest
import torch
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import InputFileError, RequestError
from comfyui_quantpress.quant_core.input_scales.synthesise import (
    Directions,
    SimulationSettings,
    index_lora_file,
    read_directions,
    simulated_magnitude,
)
from comfyui_quantpress.quant_core.names.diffusers_layers import aliases
from comfyui_quantpress.quant_core.names.layer_names import LayerNames
from comfyui_quantpress.quant_core.names.lora_keys import Factor, LoraKey, index_lora, parse_lora_key
from comfyui_quantpress.quant_core.names.prefixes import strip_prefix
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

FLUX = [
    f"double_blocks.0.{side}_{part}"
    for side in ("img", "txt")
    for part in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin")
]
FLUX += ["single_blocks.11.linear1", "single_blocks.11.linear2", "single_blocks.11.modulation.lin", "img_in"]
SD3 = [
    f"joint_blocks.2.{side}_block.{part}"
    for side in ("x", "context")
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
]
UNET = ["input_blocks.1.1.transformer_blocks.0.attn1.to_q", "input_blocks.1.1.proj_in", "down_blocks.0.attn.to_q"]
WAN = ["blocks.0.self_attn.q", "blocks.0.ffn.0"]

TABLE = [  # (tensor of a LoRA, factor, layer)
    ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", Factor.DOWN, "blocks.0.self_attn.q"),
    ("model.diffusion_model.blocks.0.ffn.0.lora_B.weight", Factor.UP, "blocks.0.ffn.0"),
    ("blocks.0.ffn.0.lora_down.weight", Factor.DOWN, "blocks.0.ffn.0"),
    ("base_model.model.blocks.0.ffn.0.lora_A.default.weight", Factor.DOWN, "blocks.0.ffn.0"),
    ("base_model.model.model.diffusion_model.blocks.0.ffn.0.lora_B.adapter_1.weight", Factor.UP, "blocks.0.ffn.0"),
    ("diffusion_model.blocks.0.ffn.0.lora_A", Factor.DOWN, "blocks.0.ffn.0"),
    ("diffusion_model.blocks.0.ffn.0.alpha", Factor.ALPHA, "blocks.0.ffn.0"),
    ("diffusion_model.blocks.0.ffn.0.dora_scale", Factor.BESIDE, "blocks.0.ffn.0"),
    ("diffusion_model.blocks.0.ffn.0.lora_B.bias", Factor.BESIDE, "blocks.0.ffn.0"),
    ("base_model.model.blocks.0.ffn.0.lora_magnitude_vector.default.weight", Factor.BESIDE, "blocks.0.ffn.0"),
    ("lora_unet_blocks_0_self_attn_q.lora_down.weight", Factor.DOWN, "blocks.0.self_attn.q"),
    ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", Factor.UP, "double_blocks.0.img_attn.qkv"),
    ("lora_unet_single_blocks_11_modulation_lin.alpha", Factor.ALPHA, "single_blocks.11.modulation.lin"),
    ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_mid.weight", Factor.BESIDE, UNET[0]),
    ("lycoris_blocks_0_ffn_0.lora_down.weight", Factor.DOWN, "blocks.0.ffn.0"),
    ("unet.down_blocks.0.attn.to_q.lora.down.weight", Factor.DOWN, "down_blocks.0.attn.to_q"),
    ("unet.down_blocks.0.attn.processor.to_q_lora.up.weight", Factor.UP, "down_blocks.0.attn.to_q"),
    ("unet.down_blocks.0.attn.to_q.lora_linear_layer.down.weight", Factor.DOWN, "down_blocks.0.attn.to_q"),
    ("transformer.transformer_blocks.0.attn.to_k.lora_A.weight", Factor.DOWN, "double_blocks.0.img_attn.qkv"),
    ("transformer.transformer_blocks.0.attn.add_v_proj.lora_B.weight", Factor.UP, "double_blocks.0.txt_attn.qkv"),
    ("transformer.single_transformer_blocks.11.proj_out.lora_A.weight", Factor.DOWN, "single_blocks.11.linear2"),
    (
        "lora_transformer_single_transformer_blocks_11_proj_mlp.lora_down.weight",
        Factor.DOWN,
        "single_blocks.11.linear1",
    ),
]


@pytest.mark.parametrize(("name", "factor", "layer"), TABLE)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_names_of_every_convention(name, factor, layer, prefix):
    names = LayerNames(prefix + own for own in FLUX + UNET + WAN)
    key = parse_lora_key(name)
    assert isinstance(key, LoraKey) and key.factor is factor
    assert names.resolve(key.base) == prefix + layer


def test_sd3_names_of_diffusers():
    names = LayerNames(SD3)
    for base, layer in [
        ("transformer.transformer_blocks.2.attn.to_q", "joint_blocks.2.x_block.attn.qkv"),
        ("transformer.transformer_blocks.2.ff_context.net.2", "joint_blocks.2.context_block.mlp.fc2"),
        ("lora_transformer_transformer_blocks_2_attn_to_out_0", "joint_blocks.2.x_block.attn.proj"),
    ]:
        assert names.resolve(base) == layer
    assert names.resolve("transformer.transformer_blocks.3.attn.to_q") is None
    assert names.resolve("joint_blocks_2_x_block_mlp_fc1") is None  # underscores count after a kohya prefix only


@given(
    st.sampled_from(FLUX + SD3 + UNET + WAN),
    st.sampled_from(["", "model.diffusion_model.", "diffusion_model.", "net."]),
    st.sampled_from(["", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "transformer."]),
)
def test_any_prefix_in_the_model_meets_any_prefix_in_the_lora(own, in_model, in_lora):
    family = next(group for group in (FLUX, SD3, UNET, WAN) if own in group)
    names = LayerNames(in_model + name for name in family)
    assert names.resolve(in_lora + own) == in_model + own
    assert names.resolve("lora_unet_" + own.replace(".", "_")) == in_model + own
    for alias in [alias.name for layer, alias in aliases(family) if layer == own]:
        assert names.resolve("transformer." + alias) == in_model + own


def test_a_name_that_fits_two_layers_is_an_error():
    names = LayerNames(["a_b.c", "a.b_c", "model.x", "transformer.x"])
    with pytest.raises(RequestError, match="'lora_unet_a_b_c' fits several layers: a_b.c, a.b_c"):
        names.resolve("lora_unet_a_b_c")
    with pytest.raises(RequestError, match="fits several"):
        names.resolve("x")
    assert names.resolve("model.x") == "model.x"


def test_stripping_never_empties_a_name():
    assert strip_prefix("model.") == "model." and strip_prefix("transformer.model.") == "model."


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("hada_w1_a", "LoHa"),
        ("hada_t2", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lokr_w2_b", "LoKr"),
        ("lokr_t2", "LoKr"),
        ("a1.weight", "GLoRA"),
        ("oft_blocks", "OFT"),
        ("oft_R.weight", "OFT"),
        ("on_input", "IA3"),
        ("diff", "full difference"),
        ("w_norm", "full difference"),
    ],
)
def test_lycoris_kinds_are_refused_by_name(suffix, kind):
    name = f"lora_unet_blocks_0_ffn_0.{suffix}"
    assert parse_lora_key(name) == kind
    with pytest.raises(InputFileError, match=rf"x.safetensors: this adapter is {kind} \({name}\), not a plain LoRA"):
        index_lora([name, "lora_unet_blocks_0_ffn_0.alpha"], LayerNames(WAN), "x.safetensors")


def test_names_that_say_nothing_are_no_lora():
    assert parse_lora_key("blocks.0.ffn.0.weight") is None and parse_lora_key(".lora_A.weight") is None
    with pytest.raises(InputFileError, match="holds no LoRA_A or lora_down tensor"):
        index_lora(["blocks.0.ffn.0.weight"], LayerNames(WAN), "x")
    with pytest.raises(InputFileError, match="none of its layers is the model's: lora_unet_foo"):
        index_lora(["lora_unet_foo.lora_down.weight", "lora_te1_a.lora_down.weight"], LayerNames(WAN), "x")
    with pytest.raises(InputFileError, match="are a text encoder's"):
        index_lora(["lora_te1_text_model_q.lora_down.weight"], LayerNames(WAN), "x")


def test_split_projections_gather_and_strangers_are_counted():
    parts = [
        f"transformer.transformer_blocks.0.attn.{part}.lora_{ab}.weight" for part in ("to_q", "to_k") for ab in "AB"
    ]
    index = index_lora(
        [*parts, "lora_te1_a.lora_down.weight", "foo.lora_A.weight", "foo.lora_B.weight"], LayerNames(FLUX), "x"
    )
    assert index.down == {"double_blocks.0.img_attn.qkv": (parts[0], parts[2])}
    assert index.up == {"double_blocks.0.img_attn.qkv": (parts[1], parts[3])}
    assert index.unresolved == ("foo",) and index.text_encoder == 1


# --- directions ----------------------------------------------------------------------------------------------------


def lora_file(tmp_path, k=16, alpha=2.0):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, k, generator=g), torch.randn(8, 4, generator=g)
    a[3] = 0
    path = tmp_path / "lora.safetensors"
    save_file(
        {
            "diffusion_model.blocks.0.ffn.0.lora_A.weight": a,
            "diffusion_model.blocks.0.ffn.0.lora_B.weight": b,
            "diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(alpha),
        },
        path,
    )
    return path, a, b


def test_directions_are_the_rows_of_lora_a_with_their_strength(tmp_path):
    path, a, b = lora_file(tmp_path)
    with open_source(path) as source:
        index = index_lora_file(source, LayerNames(WAN))
        found = read_directions(source, index, "blocks.0.ffn.0", 16)
        assert read_directions(source, index, "blocks.0.self_attn.q", 16) is None
        with pytest.raises(InputFileError, match="has 16 inputs, blocks.0.ffn.0 has 20"):
            read_directions(source, index, "blocks.0.ffn.0", 20)
    assert torch.allclose(found.rows, a[:3] / a[:3].square().mean(1, keepdim=True).sqrt())
    wanted = a[:3].norm(dim=1) * b[:, :3].norm(dim=0)
    assert torch.allclose(found.strength, wanted / wanted.sum())


# --- simulation ----------------------------------------------------------------------------------------------------


def test_simulated_magnitude_is_the_percentile_of_the_outputs():
    w = torch.diag(torch.full((32,), 2.0))
    largest = simulated_magnitude("a", w, SimulationSettings(samples=500, percentile=100))
    p50 = simulated_magnitude("a", w, SimulationSettings(samples=500, percentile=50))
    assert p50 == pytest.approx(2 * 0.6745, rel=0.05) and 6 < largest < 12


def test_simulation_is_reproducible_and_depends_on_seed_and_layer():
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    one = simulated_magnitude("a", w)
    assert one == simulated_magnitude("a", w)
    assert one != simulated_magnitude("b", w) and one != simulated_magnitude("a", w, SimulationSettings(seed=1))


def test_a_loras_directions_replace_the_random_inputs():
    w = torch.zeros(4, 4)
    w[0, 0] = 3.0
    along = Directions(torch.tensor([[2.0, 0, 0, 0]]), torch.ones(1))
    across = Directions(torch.tensor([[0, 2.0, 0, 0]]), torch.ones(1))
    assert simulated_magnitude("a", w, SimulationSettings(percentile=100), along) == 6.0
    assert simulated_magnitude("a", w, SimulationSettings(percentile=100), across) == 0.0
    with pytest.raises(RequestError, match="in_features 4, the layer 5"):
        simulated_magnitude("a", torch.zeros(4, 5), directions=along)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"percentile": 0}, {"percentile": 101}])
def test_simulation_settings_refuse_nonsense(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        SimulationSettings(**wrong)
