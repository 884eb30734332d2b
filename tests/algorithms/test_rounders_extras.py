"""What surrounds choosers and rounders: bias correction, the low-rank residual, options, automatic choice."""

from dataclasses import replace

import pytest
import torch
from comfyui_quantpress.quant_core.algorithms import choosers, rounders
from comfyui_quantpress.quant_core.algorithms.choosers import CHOOSERS, Search
from comfyui_quantpress.quant_core.algorithms.evidence import Evidence
from comfyui_quantpress.quant_core.algorithms.objective import Objective, make_objective
from comfyui_quantpress.quant_core.algorithms.residual import LowRank, lora_keys, low_rank, save_residuals
from comfyui_quantpress.quant_core.algorithms.rounders import ROUNDERS, Gptq
from comfyui_quantpress.quant_core.algorithms.task import ScaleTask, Task, layer_generator
from comfyui_quantpress.quant_core.errors import OutputError, RequestError
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.numerics.footprint import choose_device, needed_bytes
from comfyui_quantpress.quant_core.numerics.precision import tensor_core_products
from comfyui_quantpress.quant_core.pipeline.layer import quantize_layer
from comfyui_quantpress.quant_core.policy.recipe import ROUNDING, SCALES, Recipe, parse_recipe
from safetensors.torch import load_file

NVFP4 = get_format("nvfp4")


def layer(mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(64, 96, generator=generator)

    def draw(rows):
        return torch.randn(rows, 96, generator=generator) * torch.linspace(4, 0.1, 96) + mean

    x, held_out = draw(600), draw(300)
    return w, x, Evidence(hessian=x.T @ x / 600, mean=x.mean(0), rows=held_out, count=600)


def output_error(w, bias, result, rows):
    decoded = NVFP4.dequantize(result.tensors, tuple(w.shape))
    new = bias if result.bias is None else result.bias
    return float((rows @ (w - decoded).T + (bias - new).float()).norm())


def test_bias_correction_lowers_the_error_on_inputs_with_a_mean():
    w, _, evidence = layer(mean=3.0)
    bias = torch.randn(64)
    result = quantize_layer("l", w, Recipe(NVFP4), evidence, bias=bias)
    assert result.bias is not None and result.bias.dtype == bias.dtype
    assert output_error(w, bias, result, evidence.rows) < 0.8 * output_error(
        w, bias, replace(result, bias=None), evidence.rows
    )


def test_bias_is_left_alone_where_the_correction_would_hurt_held_out_inputs():
    w, _, evidence = layer(mean=3.0)
    wrong = replace(evidence, mean=-evidence.mean)
    result = quantize_layer("l", w, Recipe(NVFP4), wrong, bias=torch.zeros(64))
    assert result.bias is None and any("bias correction would raise" in note for note in result.notes)


def test_bias_is_left_alone_without_held_out_rows():
    w, _, evidence = layer(mean=3.0)
    assert quantize_layer("l", w, Recipe(NVFP4), replace(evidence, rows=None), bias=torch.zeros(64)).bias is None
    assert quantize_layer("l", w, Recipe(NVFP4), bias=torch.zeros(64)).bias is None


@pytest.mark.parametrize("data", [False, True])
def test_residual_lowers_the_error_it_was_made_for(data):
    w, _, evidence = layer()
    recipe = parse_recipe(NVFP4, options={"residual_rank": 16})
    residual = quantize_layer("blocks.0.attn", w, recipe, evidence if data else Evidence()).residual
    assert residual.up.shape == (64, 16) and residual.down.shape == (16, 96)
    assert residual.corrected_error < 0.85 * residual.error


def test_weighted_residual_beats_the_plain_one_on_the_output():
    w, x, evidence = layer()
    error = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))

    def loss(parts):
        return float((x @ (error - parts[0] @ parts[1]).T).norm())

    assert loss(low_rank(error, 8, Objective(evidence.hessian))) < 0.95 * loss(low_rank(error, 8, Objective()))


def test_a_residual_of_few_rows_trusts_their_hessian_less():
    w, x, _ = layer()
    error, few = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)), x[:60]
    parts = {rows: low_rank(error, 8, Objective(few.T @ few / 60, rows=rows)) for rows in (0, 60)}
    lost = {rows: float((x[60:] @ (error - up @ down).T).norm()) for rows, (up, down) in parts.items()}
    assert lost[60] < 0.97 * lost[0]


def test_a_layer_with_a_residual_keeps_its_bias():
    w, _, evidence = layer(mean=3.0)
    result = quantize_layer("l", w, parse_recipe(NVFP4, options={"residual_rank": 4}), evidence, bias=torch.zeros(64))
    assert result.bias is None and result.residual is not None


def test_the_weight_is_rounded_for_what_a_corrected_bias_leaves():
    generator = torch.Generator().manual_seed(0)
    mixing, mean = torch.randn(24, 96, generator=generator), 3 * torch.randn(96, generator=generator)
    x, held_out = (
        torch.randn(rows, 24, generator=generator) @ mixing + 0.3 * torch.randn(rows, 96, generator=generator) + mean
        for rows in (2000, 300)
    )
    w, evidence = (
        torch.randn(64, 96, generator=generator),
        Evidence(hessian=x.T @ x / 2000, mean=x.mean(0), rows=held_out, count=2000),
    )
    bias, recipe = torch.zeros(64), parse_recipe(NVFP4, "search", "gptq")
    result = quantize_layer("l", w, recipe, evidence, bias=bias)
    plain = quantize_layer("l", w, recipe, evidence)
    shift = (w - NVFP4.dequantize(plain.tensors, tuple(w.shape))) @ evidence.mean
    assert output_error(w, bias, result, evidence.rows) < 0.97 * output_error(
        w, bias, replace(plain, bias=bias + shift), evidence.rows
    )


def test_a_refused_correction_leaves_the_weight_as_it_is_without_one():
    w, _, evidence = layer(mean=3.0)
    wrong, recipe = replace(evidence, mean=-evidence.mean), parse_recipe(NVFP4, "search", "gptq")
    result, plain = quantize_layer("l", w, recipe, wrong, bias=torch.zeros(64)), quantize_layer("l", w, recipe, wrong)
    assert result.bias is None and all(
        torch.equal(result.tensors[name], plain.tensors[name]) for name in plain.tensors
    )


def test_centred_evidence_is_that_of_inputs_without_their_mean():
    _, x, evidence = layer(mean=3.0)
    evidence = replace(evidence, hessian_diagonal=x.square().mean(0))
    kept = evidence.hessian.clone()
    full = make_objective(NVFP4, evidence.centred(), torch.device("cpu"))
    diagonal = make_objective(NVFP4, replace(evidence, hessian=None).centred(), torch.device("cpu")).diagonal
    away = x - x.mean(0)
    assert torch.allclose(full.hessian, away.T @ away / len(x), atol=1e-3)
    assert torch.allclose(full.diagonal, away.square().mean(0), atol=1e-3) and torch.allclose(
        diagonal, full.diagonal, atol=1e-3
    )
    assert torch.equal(evidence.hessian, kept)


def test_rotating_leaves_the_callers_hessian_as_it_is():
    _, x, evidence = layer()
    fmt = get_format("int8_convrot", rotation=16)
    kept = evidence.hessian.clone()
    turned = make_objective(fmt, evidence, torch.device("cpu")).hessian
    rows = fmt.prepare(x)
    assert torch.allclose(turned, rows.T @ rows / len(x), atol=1e-3) and torch.equal(evidence.hessian, kept)


def test_weak_channels_are_not_drowned_by_a_strong_one():
    """A share of the mean diagonal would exceed all other channels' energy, and feedback among them would cease."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator) @ torch.randn(8, 96, generator=generator) + 0.1 * torch.randn(
        4000, 96, generator=generator
    )
    x[:, 5] = 0
    weak, w = x.T @ x / 4000, torch.randn(64, 96, generator=generator)
    hessian = weak.clone()
    hessian[5, 5] = 1e6
    evidence = Evidence(hessian=hessian, count=4000)
    lost = {
        rounding: Objective(weak).loss(
            w
            - NVFP4.dequantize(
                quantize_layer("l", w, parse_recipe(NVFP4, "absmax", rounding), evidence).tensors, (64, 96)
            )
        )
        for rounding in ("nearest", "gptq")
    }
    assert lost["gptq"] < 0.3 * lost["nearest"]


def test_tensor_core_products_are_switched_off_again(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    with pytest.raises(KeyError), tensor_core_products(torch.device("cuda")):
        raise KeyError
    assert calls == ["high", "highest"]
    with tensor_core_products(torch.device("cpu")):
        pass
    assert calls == ["high", "highest"]


def test_full_rank_residual_is_the_error():
    error = torch.randn(20, 12, generator=torch.Generator().manual_seed(3))
    up, down = low_rank(error, 99, Objective())
    assert torch.allclose(up @ down, error, atol=1e-5)


def test_residual_options_choose_layers():
    options = LowRank(8, r"attn\.", 2)
    assert [
        options.wants(name) for name in ("blocks.0.attn.qkv", "blocks.2.attn.qkv", "blocks.1.mlp.fc1", "attn.qkv")
    ] == [True, False, False, False]
    assert not LowRank().wants("blocks.0.attn.qkv")
    with pytest.raises(RequestError, match="regular expression"):
        LowRank(8, "(").wants("x")


def test_residual_file_has_the_keys_that_comfyui_looks_up(tmp_path):
    w, _, evidence = layer()
    residual = quantize_layer("x", w, parse_recipe(NVFP4, options={"residual_rank": 4}), evidence).residual
    names = ("model.diffusion_model.blocks.0.attn.qkv", "diffusion_model.blocks.1.attn.qkv", "blocks.2.attn.qkv")
    save_residuals(tmp_path / "lora.safetensors", dict.fromkeys(names, residual))
    stored = load_file(tmp_path / "lora.safetensors")
    assert sorted(stored) == sorted(
        f"diffusion_model.blocks.{i}.attn.qkv.lora_{side}.weight" for i in range(3) for side in ("up", "down")
    )
    assert torch.equal(stored[lora_keys("blocks.2.attn.qkv")[0]], residual.up)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
    with pytest.raises(RequestError, match="no layer matches"):
        save_residuals(tmp_path / "none.safetensors", {})
    with pytest.raises(OutputError, match="Choose another folder"):
        save_residuals(tmp_path / "missing" / "lora.safetensors", {"a": residual})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampng": 0.1}, "no option 'dampng'"),
        ({"damping": "much"}, "damping: found 'much', needs a value of type float"),
        ({"damping": -1.0}, "damping: found -1.0, needs 1e-06 to 10.0"),
        ({"order": "random"}, "order: found 'random'. Choose one of activation, natural"),
        ({"sweeps": True}, "sweeps: found True"),
        ({"sweeps": 1.5}, "sweeps: found 1.5"),
        ({"full_matrix": "False"}, "full_matrix: found 'False', needs true or false"),
        ({"optimizer": "prodigy"}, "optimizer: found 'prodigy'. Choose one of original, adamw, radam"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(RequestError) as caught:
        parse_recipe(NVFP4, options=options)
    assert message in str(caught.value)


def test_good_options_pass():
    parse_recipe(NVFP4, "auto", "auto", options={"damping": 1, "sweeps": 0, "residual_rank": 8, "lr": 1})


def test_automatic_choice_follows_what_is_known():
    _, _, evidence = layer()
    recipe = parse_recipe(NVFP4, "auto", "auto")
    for known, rounding in (
        (Evidence(), "nearest"),
        (Evidence(hessian_diagonal=torch.ones(96)), "nearest"),
        (evidence, "gptq"),
    ):
        chosen = recipe.resolve(known)
        assert (chosen.scales.name, chosen.rounding.name) == ("search", rounding)
    w, _, _ = layer()
    judgement = quantize_layer("l", w, recipe, evidence).judgement
    assert (judgement.scales, judgement.rounding, judgement.objective) == ("search", "gptq", "output")
    assert judgement.error < judgement.nearest_error


def test_a_layer_too_large_for_the_gpu_is_computed_on_the_cpu_and_says_so():
    gpu = torch.device("cuda:0")
    needed = needed_bytes((3072, 12288), Gptq.weight_copies, True)
    assert needed > 4 * 3072 * 12288 * 8
    assert choose_device(gpu, needed, needed) == (gpu, None)
    device, note = choose_device(gpu, needed - 1, needed)
    assert device.type == "cpu" and "GiB free" in note
    assert choose_device(torch.device("cpu"), None, needed) == (torch.device("cpu"), None)


def test_a_recipe_of_objects_describes_itself_as_the_one_parsed_from_their_options():
    options = {"search_refits": 1, "damping": 0.5, "residual_rank": 8}
    parsed = parse_recipe(NVFP4, "search", "gptq", 3, options)
    made = Recipe(NVFP4, Search(refits=1), Gptq(damping=0.5), 3, LowRank(rank=8))
    assert made.describe() == parsed.describe() and parsed.describe()["options"] == options
    assert parse_recipe(NVFP4, "auto", "auto", 3, options).describe()["options"] == options
    assert "options" not in Recipe(NVFP4, Search(), Gptq()).describe()
    assert replace(parsed, rounding=Gptq()).describe()["options"]["damping"] == 0.01
    assert Recipe(NVFP4).plain and not made.plain and parse_recipe(NVFP4, "absmax", "nearest").plain


def test_other_methods_keep_the_options_and_settings_are_checked_wherever_they_are_made():
    recipe = parse_recipe(NVFP4, options={"damping": 0.5}).with_methods("absmax", "gptq")
    assert recipe.rounding == Gptq(damping=0.5)
    with pytest.raises(RequestError, match="damping: found -1.0, needs 1e-06 to 10.0"):
        Gptq(damping=-1.0)


@pytest.mark.parametrize("data", [False, True])
def test_auto_asked_for_a_task_rounds_as_what_it_stands_for(data):
    w, _, evidence = layer()
    objective = make_objective(NVFP4, evidence if data else Evidence(), w.device)
    auto, named = (
        parse_recipe(NVFP4, *names) for names in (("auto", "auto"), ("search", "gptq" if data else "nearest"))
    )
    codes = []
    for recipe in (auto, named):
        task = Task(NVFP4, w, objective, layer_generator(0, "l"))
        begun = recipe.rounding.begin(task)
        codes.append(begun.finish(recipe.scales.choose(ScaleTask(NVFP4, w, begun.weights))).codes)
    assert torch.equal(*codes)


def test_every_method_can_be_told_from_the_others_and_explains_itself():
    for methods in (SCALES, ROUNDING):
        assert [kind.name for kind in methods.values()] == list(methods)
        assert all(kind.explain.endswith(".") for kind in methods.values())
    assert len(CHOOSERS) == len(choosers.ALL) and len(ROUNDERS) == len(rounders.ALL)
