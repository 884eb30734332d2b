"""LoRA baking, and files put together and taken apart: nothing lost, header and tensors in sync."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves the folder of the tests out
from comfyui_quantpress.quant_core.checkpoint.source import open_source  # noqa: E402
from comfyui_quantpress.quant_core.errors import Cancelled, InputFileError, OutputError, PlanError, RequestError  # noqa: E402
from comfyui_quantpress.quant_core.formats import format_of_layer, get_format  # noqa: E402
from comfyui_quantpress.quant_core.names.prefixes import MODEL_PREFIX  # noqa: E402
from comfyui_quantpress.quant_core.numerics.metrics import relative_error  # noqa: E402
from comfyui_quantpress.quant_core.pipeline.verify import check_file  # noqa: E402
from comfyui_quantpress.quant_core.tools.lora import RECORD_KEY, bake  # noqa: E402
from comfyui_quantpress.quant_core.tools.merge import extract, insert, join, split  # noqa: E402
from comfyui_quantpress.quant_core.tools.rewrite import Draft  # noqa: E402
from tool_files import assert_untouched, canonical_file, config_of, decoded, weight  # noqa: E402

HIDDEN, RANK = 64, 4


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def flux_file(path: Path, prefix: str = "") -> tuple[Path, dict[str, Tensor]]:
    tensors = {
        f"{prefix}double_blocks.0.img_attn.qkv.weight": randn(3 * HIDDEN, HIDDEN, seed=1),
        f"{prefix}double_blocks.0.img_attn.proj.weight": randn(HIDDEN, HIDDEN, seed=2).bfloat16(),
        f"{prefix}single_blocks.0.linear1.weight": randn(7 * HIDDEN, HIDDEN, seed=3),
        f"{prefix}conv.weight": randn(8, 16, 3, 3, seed=4),
        f"{prefix}norm.weight": randn(HIDDEN, seed=5),
        f"{prefix}a.bias": randn(3, seed=6),
        f"{prefix}b.bias": randn(3, seed=7),
        f"{prefix}c.bias": randn(3, seed=8),
    }
    save_file(tensors, path, {"keep": "me"})
    return path, tensors


def pair(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    return randn(RANK, k, seed=seed), randn(n, RANK, seed=seed + 100)


QKV, PROJ, LINEAR1 = ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj", "single_blocks.0.linear1")
STYLES = {
    "kohya": lambda base: (
        f"lora_unet_{base.replace('.', '_')}.lora_down.weight",
        f"lora_unet_{base.replace('.', '_')}.lora_up.weight",
        f"lora_unet_{base.replace('.', '_')}.alpha",
    ),
    "lycoris": lambda base: (
        f"lycoris_{base.replace('.', '_')}.lora_down.weight",
        f"lycoris_{base.replace('.', '_')}.lora_up.weight",
        f"lycoris_{base.replace('.', '_')}.alpha",
    ),
    "comfy": lambda base: (
        f"diffusion_model.{base}.lora_down.weight",
        f"diffusion_model.{base}.lora_up.weight",
        f"diffusion_model.{base}.alpha",
    ),
    "peft": lambda base: (
        f"base_model.model.{base}.lora_A.default.weight",
        f"base_model.model.{base}.lora_B.default.weight",
        f"base_model.model.{base}.alpha",
    ),
}


def baked(model: Path, lora: dict[str, Tensor], strength: float = 1.0, **options) -> dict[str, Tensor]:
    path = model.with_name("lora.safetensors")
    save_file({name: t.contiguous() for name, t in lora.items()}, path)
    target = model.with_name("baked.safetensors")
    with open_source(model) as src, open_source(path) as adapter:
        rewrite = bake(src, [(adapter, strength)], **options)
        rewrite.apply(target, overwrite=True)
    with open_source(target) as src:
        assert json.loads(src.metadata[RECORD_KEY])[0]["strength"] == strength
        return {name: src.read(name) for name in src.tensors}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_whole_layers_under_every_tool_s_names(tmp_path, style, alpha, prefix):
    model, tensors = flux_file(tmp_path / "m.safetensors", prefix)
    lora, expected = {}, {}
    for seed, base in ((11, QKV), (12, PROJ), (13, LINEAR1)):
        old = tensors[f"{prefix}{base}.weight"]
        down, up = pair(*old.shape, seed)
        down_name, up_name, alpha_name = STYLES[style](base)
        lora |= {down_name: down, up_name: up} | ({alpha_name: torch.tensor(alpha)} if alpha else {})
        change = (up @ down) * (0.7 * (alpha if alpha else RANK) / RANK)
        expected[f"{prefix}{base}.weight"] = (old.float() + change).to(old.dtype)
    result = baked(model, lora, 0.7)
    for name, want in expected.items():
        assert result[name].dtype == want.dtype and torch.equal(result[name], want), name
    assert_untouched(model, tmp_path / "baked.safetensors", set(expected), header=set())


def test_parts_of_fused_layers_change_their_rows_only(tmp_path):
    model, tensors = flux_file(tmp_path / "m.safetensors")
    k_down, k_up = pair(HIDDEN, HIDDEN, 21)
    mlp_down, mlp_up = pair(4 * HIDDEN, HIDDEN, 22)
    v_down, v_up = pair(HIDDEN, HIDDEN, 23)
    result = baked(
        model,
        {
            "transformer.transformer_blocks.0.attn.to_k.lora_A.weight": k_down,
            "transformer.transformer_blocks.0.attn.to_k.lora_B.weight": k_up,
            "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": mlp_down,
            "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight": mlp_up,
            "lora_unet_single_transformer_blocks_0_attn_to_v.lora_down.weight": v_down,
            "lora_unet_single_transformer_blocks_0_attn_to_v.lora_up.weight": v_up,
        },
    )
    qkv, linear1 = tensors[f"{QKV}.weight"].clone(), tensors[f"{LINEAR1}.weight"].clone()
    qkv[HIDDEN : 2 * HIDDEN] += k_up @ k_down
    linear1[3 * HIDDEN :] += mlp_up @ mlp_down
    linear1[2 * HIDDEN : 3 * HIDDEN] += v_up @ v_down
    assert torch.allclose(result[f"{QKV}.weight"], qkv, atol=1e-6) and torch.equal(
        result[f"{QKV}.weight"][:HIDDEN], qkv[:HIDDEN]
    )
    assert torch.allclose(result[f"{LINEAR1}.weight"], linear1, atol=1e-6)


def test_convolutions_are_baked(tmp_path):
    model, tensors = flux_file(tmp_path / "m.safetensors")
    down, up = randn(RANK, 16, 3, 3, seed=31), randn(8, RANK, 1, 1, seed=32)
    result = baked(model, {"lora_unet_conv.lora_down.weight": down, "lora_unet_conv.lora_up.weight": up}, -0.5)
    want = tensors["conv.weight"] - 0.5 * torch.einsum("nr,rkhw->nkhw", up[:, :, 0, 0], down)
    assert torch.allclose(result["conv.weight"], want, atol=1e-6)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"lora_unet_nowhere.lora_down.weight": (RANK, 8), "lora_unet_nowhere.lora_up.weight": (8, RANK)},
            "1 layer is not in",
        ),
        ({f"diffusion_model.{PROJ}.dora_scale": (HIDDEN // 2, 1)}, "needs one number for each row"),
        ({"lora_unet_conv.hada_w1_a": (4, 4)}, "no w1_b factor of a LoHa"),
        ({"lora_unet_conv.lokr_w1": (4, 4)}, "no w2_a factor of a LoKr"),
        ({"lora_unet_conv.lora_down.weight": (RANK, 16, 3, 3)}, "no up factor"),
        (
            {"lora_unet_conv.lora_down.weight": (RANK, 16, 1, 1), "lora_unet_conv.lora_up.weight": (8, RANK, 1, 1)},
            "do not make",
        ),
        (
            {
                "lora_unet_conv.lora_down.weight": (RANK, 16, 3, 3),
                "lora_unet_conv.lora_up.weight": (8, RANK, 1, 1),
                "lora_unet_conv.lora_mid.weight": (RANK, RANK, 3, 3),
            },
            "do not make a",
        ),
    ],
)
def test_what_cannot_be_baked_exactly_is_refused_by_name(tmp_path, extra, message):
    model, _ = flux_file(tmp_path / "m.safetensors")
    down, up = pair(HIDDEN, HIDDEN, 41)
    lora = {f"diffusion_model.{PROJ}.lora_A.weight": down, f"diffusion_model.{PROJ}.lora_B.weight": up}
    lora |= {name: torch.ones(shape) for name, shape in extra.items()}
    with pytest.raises(PlanError, match=message):
        baked(model, lora)
    assert not (tmp_path / "baked.safetensors").exists()


def test_unmatched_layers_can_be_skipped_and_text_encoders_always_are(tmp_path):
    model, _ = flux_file(tmp_path / "m.safetensors")
    down, up = pair(HIDDEN, HIDDEN, 51)
    names = [f"diffusion_model.{PROJ}", "diffusion_model.nowhere", "lora_te1_text_model_encoder_layers_0_mlp_fc1"]
    lora = {f"{name}.lora_{part}.weight": t.clone() for name in names for part, t in (("down", down), ("up", up))}
    with open_source(model) as src:
        assert "nowhere" not in src.tensors
    result = baked(model, lora, skip_unmatched=True)
    assert "nowhere.weight" not in result


@pytest.mark.parametrize("name", ["int8_rowwise", "bnb_nf4"])  # of the weight's shape, and packed
def test_quantized_weights_are_refused_with_the_remedy(tmp_path, name):
    model = canonical_file(tmp_path / "q.safetensors", name)
    save_file(
        {"blocks.0.lora_down.weight": torch.ones(4, 256), "blocks.0.lora_up.weight": torch.ones(256, 4)},
        tmp_path / "l.safetensors",
    )
    with (
        open_source(model) as src,
        open_source(tmp_path / "l.safetensors") as lora,
        pytest.raises(PlanError, match="dequantize"),
    ):
        bake(src, [(lora, 1.0)])


@pytest.mark.parametrize("record", ["nonsense", "{}"])
def test_a_damaged_record_of_earlier_loras_is_not_lost(tmp_path, record):
    save_file({"blocks.0.weight": torch.ones(8, 8)}, tmp_path / "m.safetensors", {RECORD_KEY: record})
    with pytest.raises(InputFileError, match=RECORD_KEY):
        baked(
            tmp_path / "m.safetensors",
            {"blocks.0.lora_down.weight": torch.ones(4, 8), "blocks.0.lora_up.weight": torch.ones(8, 4)},
        )


def test_overflow_is_an_error(tmp_path):
    save_file({"blocks.0.weight": torch.full((8, 8), 60000.0, dtype=torch.float16)}, tmp_path / "m.safetensors")
    with pytest.raises(InputFileError, match="exceed what F16 holds"):
        baked(
            tmp_path / "m.safetensors",
            {"blocks.0.lora_down.weight": torch.ones(4, 8), "blocks.0.lora_up.weight": torch.ones(8, 4) * 1e4},
        )


@pytest.mark.parametrize("name", ["int8_rowwise", "nvfp4", "bnb_nf4", "float8_e4m3fn"])
def test_baking_first_is_nearer_than_applying_to_quantized_weights(name):
    """What a loader does with a LoRA on quantized weights: decode, add, quantize again. That rounds twice."""
    fmt, w = get_format(name), weight(0).float()
    down, up = pair(*w.shape, 61)
    target = w + up @ down

    def through(x: Tensor) -> Tensor:
        return fmt.dequantize(fmt.quantize(x), tuple(x.shape))

    assert relative_error(target, through(target)) < relative_error(target, through(through(w) + up @ down))


def checkpoint_file(path: Path, name: str = "nvfp4") -> Path:
    inner = canonical_file(path.with_name("inner.safetensors"), name)
    with open_source(inner) as src:
        tensors = {MODEL_PREFIX + n: src.read(n) for n in src.tensors}
        layers = {
            MODEL_PREFIX + layer: config
            for layer, config in json.loads(src.metadata["_quantization_metadata"])["layers"].items()
        }
    tensors |= {"vae.w.weight": randn(4, 4, seed=1), "vae.w.bias": randn(4, seed=2)}
    save_file(
        tensors,
        path,
        {"keep": "me", "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})},
    )
    return path


def test_a_model_comes_out_of_a_checkpoint_and_goes_back(tmp_path):
    whole = checkpoint_file(tmp_path / "whole.safetensors")
    with open_source(whole) as src:
        extract(src).apply(tmp_path / "model.safetensors")
    assert not check_file(tmp_path / "model.safetensors").findings
    assert config_of(tmp_path / "model.safetensors", "blocks.0")["format"] == "nvfp4"
    assert_untouched(tmp_path / "inner.safetensors", tmp_path / "model.safetensors", header={"keep", "format"})
    with open_source(whole) as src, open_source(tmp_path / "model.safetensors") as model:
        insert(src, model).apply(tmp_path / "again.safetensors")
    assert_untouched(whole, tmp_path / "again.safetensors", header=set())


def test_another_quantization_of_the_model_goes_into_the_checkpoint(tmp_path):
    whole = checkpoint_file(tmp_path / "whole.safetensors")
    other = canonical_file(tmp_path / "int8.safetensors", "int8_rowwise")
    with open_source(whole) as src, open_source(other) as model:
        insert(src, model).apply(tmp_path / "new.safetensors")
    assert not check_file(tmp_path / "new.safetensors").findings
    assert config_of(tmp_path / "new.safetensors", MODEL_PREFIX + "blocks.1")["format"] == "int8_tensorwise"
    one, two = decoded(other), decoded(tmp_path / "new.safetensors")
    assert all(torch.equal(w, two[MODEL_PREFIX + layer]) for layer, w in one.items())
    flux, _ = flux_file(tmp_path / "flux.safetensors")
    with open_source(whole) as src, open_source(flux) as model, pytest.raises(PlanError, match="same model"):
        insert(src, model)


def test_extract_says_what_is_there(tmp_path):
    with (
        open_source(canonical_file(tmp_path / "a.safetensors")) as src,
        pytest.raises(RequestError, match="the prefix"),
    ):
        extract(src)


def test_shards_and_one_file(tmp_path):
    source = canonical_file(tmp_path / "a.safetensors", "bnb_nf4")
    with open_source(source) as src:
        shards = split(src, tmp_path / "a.safetensors.index.json", 45_000)
        assert len(shards) >= 2 and all(path.exists() for path in shards)
        with pytest.raises(RequestError, match="larger shards"):
            split(src, tmp_path / "b.safetensors.index.json", 10_000)
        with pytest.raises(OutputError, match="exists"):
            split(src, tmp_path / "a.safetensors.index.json", 45_000)
    assert all(not check_file(path).errors for path in shards)
    with open_source(tmp_path / "a.safetensors.index.json") as src:
        join(src).apply(tmp_path / "joined.safetensors")
    assert_untouched(source, tmp_path / "joined.safetensors", header=set())
    assert_untouched(tmp_path / "joined.safetensors", source, header=set())


def test_one_shard_alone_is_no_model(tmp_path):
    with open_source(canonical_file(tmp_path / "a.safetensors", "bnb_nf4")) as src:
        shards = split(src, tmp_path / "a.safetensors.index.json", 45_000)
    with (
        open_source(shards[0]) as src,
        pytest.raises(RequestError, match=f"shard 1 of {len(shards)}, a part of the model. Give the"),
    ):
        join(src)


def test_a_layer_that_lost_its_scale_says_which_tensor_is_missing():
    with pytest.raises(
        RequestError, match=r"blocks.0: stored as float8_e4m3fn, but weight_scale is missing; found weight \[64, 32\]"
    ):
        format_of_layer("blocks.0", {"format": "float8_e4m3fn"}, {"weight": (64, 32)})


def test_the_progress_of_a_split_runs_once_over_all_shards(tmp_path):
    states = []
    with open_source(canonical_file(tmp_path / "a.safetensors", "bnb_nf4")) as src:
        shards = split(src, tmp_path / "a.safetensors.index.json", 45_000, progress=states.append)
        assert len(shards) > 1 and len(states) == len(src.tensors) == states[-1].done_layers
        assert states[-1].done_bytes == src.nbytes == states[0].total_bytes
    assert [state.done_bytes for state in states] == sorted(state.done_bytes for state in states)


def test_a_cancelled_split_leaves_nothing(tmp_path):
    source = canonical_file(tmp_path / "a.safetensors", "bnb_nf4")
    calls = []
    with open_source(source) as src, pytest.raises(Cancelled):
        split(
            src,
            tmp_path / "a.safetensors.index.json",
            45_000,
            progress=lambda state: calls.append(time.sleep(0.03)),
            cancel=lambda: len(calls) > 8,
        )
    assert calls and [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_two_tensors_cannot_get_one_name(tmp_path):
    with (
        open_source(canonical_file(tmp_path / "a.safetensors")) as src,
        pytest.raises(RequestError, match="there already"),
    ):
        Draft(src).rename("norm.weight", "final.weight")
