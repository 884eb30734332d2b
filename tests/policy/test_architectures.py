"""The table of architectures: it is well formed, and every model in it is recognised from names and shapes alone."""

from __future__ import annotations

import json
import random

import pytest
from comfyui_quantpress.quant_core.names.prefixes import COMFYUI, INNER, WRAPPERS
from comfyui_quantpress.quant_core.policy.architectures import (
    DIFFUSION_MODEL,
    TABLE,
    TEXT_ENCODER,
    Architecture,
    architectures,
    generalise,
    in_numbered_block,
    recognise,
)
from known_models import DIMENSIONS, numbered, state_of

KNOWN = {known.id: known for known in architectures()}
DIFFUSION = [known for known in architectures() if known.sort == DIFFUSION_MODEL]
OTHERS = [known for known in architectures() if known.sort != DIFFUSION_MODEL]
DEPTHS = (2, 5)


def found(state: dict[str, tuple[int, ...]]) -> str | None:
    model = recognise(state)
    return model.architecture.id if model else None


def ids(models: list[Architecture]) -> list[str]:
    return [known.id for known in models]


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_is_small_enough_to_be_read():
    assert TABLE.stat().st_size < 400_000


def test_every_id_and_name_is_there_once():
    assert len(KNOWN) == len(architectures()) == len({known.name for known in architectures()})


@pytest.mark.parametrize("entry", json.loads(TABLE.read_text("utf-8"))["architectures"], ids=lambda entry: entry["id"])
def test_an_entry_is_sorted_and_says_one_kind_of_every_pattern(entry):
    kinds = [entry.get(kind, []) for kind in DIMENSIONS]
    assert all(patterns == sorted(patterns) for patterns in (*kinds, entry.get("shape_read", [])))
    everything = [pattern for patterns in kinds for pattern in patterns]
    assert len(everything) == len(set(everything))
    assert entry.get("linear") or entry["marks"]


@pytest.mark.parametrize("known", DIFFUSION, ids=ids(DIFFUSION))
def test_what_detection_reads_is_a_tensor_of_the_model(known):
    for pattern in known.shapes_read:
        assert all(known.kind_of(name) for name in numbered(pattern, 1)), pattern


@pytest.mark.parametrize("known", DIFFUSION, ids=ids(DIFFUSION))
def test_no_sign_of_a_diffusion_model_makes_it_something_else(known):
    assert found({name: (1,) for name in state_of(known)}) in (None, known.id)


# --- every model is recognised ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("known", architectures(), ids=ids(list(architectures())))
def test_a_model_is_recognised_at_any_depth(known, depth):
    assert found(state_of(known, depth)) == known.id


@pytest.mark.parametrize("known", DIFFUSION, ids=ids(DIFFUSION))
def test_a_fine_tune_that_adds_layers_and_leaves_some_out_is_recognised(known):
    state = state_of(known, 3)
    chance = random.Random(0)
    droppable = [name for name in state if name not in known.signs]
    for name in chance.sample(droppable, len(droppable) // 10):
        del state[name]
    state |= {f"adapter.{n}.down.weight": (8, 8) for n in range(4)}
    state |= {f"extra_{letter}.weight": (8, 8) for letter in "abc"[: len(known.patterns) // 12]}
    assert found(state) == known.id


@pytest.mark.parametrize("prefix", ["", *COMFYUI, *WRAPPERS, "module._orig_mod.", "_orig_mod.model.diffusion_model."])
def test_a_prefix_is_told_apart_and_whether_comfyui_finds_the_model_behind_it(prefix):
    for known in (KNOWN["flux"], KNOWN["wan"], KNOWN["sdxl"], KNOWN["stable_audio"]):
        model = recognise(state_of(known, 3, prefix))
        assert model and (model.architecture.id, model.prefix) == (known.id, prefix)
        assert model.comfyui_finds_it == (prefix in ("", *COMFYUI))


@pytest.mark.parametrize("prefix", ["denoiser.", "first_stage.", "wrapped.inner.", "backbone._orig_mod."])
def test_a_prefix_that_no_table_knows_is_found_where_most_names_share_it(prefix):
    for known in (KNOWN["flux"], KNOWN["wan"], KNOWN["sdxl"], KNOWN["t5_xxl"]):
        state = state_of(known, 3, prefix) | {"epoch": (), "optimizer.state.0.exp_avg": (8, 8)}
        model = recognise(state)
        assert model and model.architecture.id == known.id and not model.comfyui_finds_it
        linear = next(name for name, kind in known.patterns.items() if kind == "linear")
        assert model.kind_of(f"{prefix}{numbered(linear, 1)[0]}") == "linear"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module."])
@pytest.mark.parametrize("part", INNER)
def test_what_wrappers_leave_inside_names_is_seen_through(part, prefix):
    for known in (KNOWN["flux"], KNOWN["wan"], KNOWN["sdxl"]):
        state = {name.replace(".0.", f".0.{part}", 1): shape for name, shape in state_of(known, 3, prefix).items()}
        model = recognise(state)
        assert model and (model.architecture.id, model.prefix, model.inner) == (known.id, prefix, (part,))
        assert not model.comfyui_finds_it
        for name in state:
            plain = name.replace(part, "").removeprefix(prefix)
            assert model.kind_of(name) == known.kind_of(plain), name


def test_the_model_of_a_whole_checkpoint_is_the_diffusion_model():
    parts = {
        "model.diffusion_model.": KNOWN["sd3"],
        "text_encoders.t5xxl.transformer.": KNOWN["t5_xxl"],
        "text_encoders.clip_l.transformer.": KNOWN["clip_l"],
    }
    state = {name: shape for prefix, known in parts.items() for name, shape in state_of(known, 8, prefix).items()}
    model = recognise(state | {"first_stage_model.decoder.conv_in.weight": (8, 8, 3, 3)})
    assert model and model.architecture.id == "sd3" and model.comfyui_finds_it
    assert model.kind_of("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight") == "linear"
    assert model.kind_of("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight") is None


def test_names_that_comfyui_renames_on_loading_are_known_as_well():
    hunyuan = KNOWN["hunyuan_video"]
    for theirs, ours in {
        "double_blocks.3.img_attn_qkv.weight": "double_blocks.3.img_attn.qkv.weight",
        "double_blocks.3.txt_mlp.fc2.weight": "double_blocks.3.txt_mlp.2.weight",
        "single_blocks.3.modulation.linear.weight": "single_blocks.3.modulation.lin.weight",
    }.items():
        assert hunyuan.kind_of(theirs) == hunyuan.kind_of(ours) == "linear"


# --- what is no known model ------------------------------------------------------------------------------------------

DIFFUSERS_FLUX = {
    "x_embedder.weight": (3072, 64),
    "context_embedder.weight": (3072, 4096),
    "norm_out.linear.weight": (6144, 3072),
    "proj_out.weight": (64, 3072),
    **{f"time_text_embed.timestep_embedder.linear_{n}.weight": (8, 8) for n in (1, 2)},
    **{f"transformer_blocks.{n}.attn.{p}.weight": (8, 8) for n in range(3) for p in ("to_q", "to_k", "add_q_proj")},
    **{f"transformer_blocks.{n}.{p}.net.0.proj.weight": (8, 8) for n in range(3) for p in ("ff", "ff_context")},
    **{f"single_transformer_blocks.{n}.{p}.weight": (8, 8) for n in range(3) for p in ("attn.to_q", "proj_mlp")},
}
DIFFUSERS_SDXL = {
    "conv_in.weight": (320, 4, 3, 3),
    "time_embedding.linear_1.weight": (1280, 320),
    "add_embedding.linear_1.weight": (1280, 2816),
    **{
        f"down_blocks.{n}.attentions.0.transformer_blocks.0.attn{a}.to_q.weight": (8, 8)
        for n in (1, 2)
        for a in (1, 2)
    },
    **{f"down_blocks.{n}.resnets.0.conv1.weight": (8, 8, 3, 3) for n in range(3)},
}
LORA = {
    f"diffusion_model.double_blocks.{n}.img_attn.qkv.lora_{side}.weight": (8, 8) for n in range(19) for side in "AB"
}
ELSEWHERE = {f"encoder.stages.{n}.mixer.{p}.weight": (8, 8) for n in range(4) for p in ("in_proj", "out_proj", "gate")}


@pytest.mark.parametrize(
    "state",
    [{}, DIFFUSERS_FLUX, DIFFUSERS_SDXL, LORA, ELSEWHERE, {"blocks.0.attn.q.weight": (8, 8)}],
    ids=["nothing", "Flux of diffusers", "SDXL of diffusers", "a LoRA", "another program's", "one layer"],
)
def test_other_files_are_not_taken_for_a_known_model(state):
    assert recognise(state) is None


def test_a_layer_that_the_model_does_not_have_is_of_no_kind():
    assert KNOWN["flux"].kind_of("double_blocks.0.img_attn.extra.weight") is None
    assert KNOWN["flux"].kind_of("double_blocks.0.img_attn.qkv.weight_scale") is None


# --- what the table is for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "weight", "kind"),
    [
        ("wan", "motion_encoder.enc.fc.3.weight", "parameter"),
        ("wan", "motion_encoder.dec.direction.weight", "parameter"),
        ("wan", "trainable_cond_mask.weight", "embedding"),
        ("wan", "blocks.39.ffn.2.weight", "linear"),
        ("ace", "lyric_embs.weight", "embedding"),
        ("stable_audio", "timestep_features.weight", "parameter"),
        ("hidream", "double_stream_blocks.0.block.ff_i.gate.weight", "gate"),
        ("hunyuan3d21", "blocks.15.moe.gate.weight", "gate"),
        ("t5_xxl", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "embedding"),
        ("sd1", "input_blocks.1.1.proj_in.weight", "conv"),
        ("sd2", "input_blocks.1.1.proj_in.weight", "linear"),
        ("cosmos", "blocks.block7.blocks.0.block.attn.to_q.0.weight", "linear"),
        ("pixeldit", "core.pixel_blocks.0.adaLN_modulation.0.weight", "parameter"),
    ],
)
def test_what_only_looks_like_a_linear_layer_is_told_apart(model, weight, kind):
    assert KNOWN[model].kind_of(weight) == kind


@pytest.mark.parametrize(
    ("model", "weight"),
    [
        ("ltxv", "transformer_blocks.0.attn2.to_k.weight"),
        ("ltx2", "transformer_blocks.0.attn2.to_k.weight"),
        ("sd1", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"),
        ("sdxl", "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"),
        ("auraflow", "cond_seq_linear.weight"),
        ("hunyuan3d2", "latent_in.weight"),
        ("krea2", "blocks.0.attn.wq.weight"),
    ],
)
def test_the_shapes_that_detection_reads_are_known(model, weight):
    assert KNOWN[model].shape_read(weight)
    assert not KNOWN[model].shape_read(
        weight.replace("_blocks.0.", "_blocks.1.").replace("blocks.0.", "blocks.1.") + "x"
    )


def test_another_block_of_a_layer_whose_shape_is_read_may_be_packed():
    assert not KNOWN["ltxv"].shape_read("transformer_blocks.1.attn2.to_k.weight")
    assert not KNOWN["krea2"].shape_read("blocks.1.attn.wq.weight")


def test_which_text_encoders_comfyui_runs_quantized():
    encoders = {known.id: known.runs_quantized for known in architectures() if known.sort == TEXT_ENCODER}
    assert [name for name, runs in encoders.items() if not runs] == [
        "clip_g",
        "clip_h",
        "clip_l",
        "jina_clip2",
        "t5_xl",
        "mt5_xl",
        "byt5",
        "umt5_base",
        "t5_base",
        "t5_gemma",
    ]


def test_what_stands_beside_a_diffusion_model_is_not_run_quantized():
    beside = {known.sort: known.runs_quantized for known in OTHERS if known.sort not in (TEXT_ENCODER, "VAE")}
    assert beside == dict.fromkeys(
        ("ControlNet", "IP-Adapter", "style model", "GLIGEN", "CLIP vision", "audio encoder"), False
    )


def test_a_flux_controlnet_is_not_taken_for_a_flux():
    state = state_of(KNOWN["flux"], 2) | {"controlnet_blocks.0.weight": (8, 8), "controlnet_x_embedder.weight": (8, 8)}
    assert found(state) == "controlnet"


@pytest.mark.parametrize(
    ("name", "general"),
    [
        ("blocks.12.attn.q.weight", "blocks.N.attn.q.weight"),
        ("blocks.block3.blocks.0.fc1.weight", "blocks.blockN.blocks.N.fc1.weight"),
        ("time_embedding_linear_1.weight", "time_embedding_linear_1.weight"),
        ("0.weight", "N.weight"),
    ],
)
def test_a_number_is_general_only_between_dots(name, general):
    assert generalise(name) == general


@pytest.mark.parametrize(
    ("layer", "inside"),
    [
        ("blocks.3.attn.q", True),
        ("input_blocks.1.1.proj_in", True),
        ("blocks.block3.blocks.0.block.attn.to_q.0", True),
        ("noise_refiner.0.attention.qkv", True),
        ("blocks.3.0", True),
        ("layers.0", False),
        ("time_embed.2", False),
        ("init_x_linear", False),
        ("byt5_in.fc1", False),
    ],
)
def test_what_repeats_is_told_from_what_stands_alone(layer, inside):
    assert in_numbered_block(layer) == inside
