"""Files of other quantizers: each is named, with what to take instead, by every command; no file comes of it."""

import json
from pathlib import Path

import pytest
import torch
from comfyui_quantpress.cli.main import main
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import InputFileError
from comfyui_quantpress.quant_core.formats import all_formats
from comfyui_quantpress.quant_core.pipeline.verify import check_file
from comfyui_quantpress.quant_core.stored.families import FAMILIES, recognise
from comfyui_quantpress.quant_core.stored.layers import stored_layers
from comfyui_quantpress.quant_core.stored.unread import unread
from comfyui_quantpress.quant_core.tools.repair import repair
from safetensors.torch import save_file

N = 64
LAYER = "blocks.0.attn.k"


def codes(dtype: torch.dtype = torch.int8, *shape: int) -> torch.Tensor:
    size = shape or (N, N)
    return torch.randint(1, 100, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def floats(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)) * 0.01 + 0.001


I8, U8, I32, U32 = torch.int8, torch.uint8, torch.int32, torch.uint32
COLUMN = floats(N, 1)
# {family as it is named: [{end of the name: tensor}, ...]}
FILES = {
    "SDNQ": [
        {"weight": codes(), "scale": COLUMN},
        {"weight": codes(U8, N, N // 2), "scale": COLUMN, "zero_point": COLUMN},
        {"weight": codes(U8, N * N // 2), "scale": COLUMN, "zero_point": COLUMN},
        {"weight": codes(), "scale": COLUMN, "svd_up": floats(N, 8), "svd_down": floats(8, N)},
        {"weight": floats(N, N).to(torch.float8_e4m3fn), "scale": COLUMN, "svd_up": COLUMN, "svd_down": floats(1, N)},
        {"weight": codes(torch.int16), "scale": COLUMN},
    ],
    "TurboDiffusion": [{"int8_weight": codes(), "scale": floats(1, 1)}],
    "MLX": [
        {"weight": codes(U32, N, N // 8), "scales": floats(N, 2), "biases": floats(N, 2)},
        {"weight": codes(U32, N, N // 8), "scales": codes(U8, N, 2)},
    ],
    "torchao": [
        {"_weight_qdata": codes(), "_weight_scale": COLUMN},
        {"weight_qdata": codes(), "weight_scale": COLUMN},
        {"_weight_qdata": floats(N, N).to(torch.float8_e4m3fn), "_weight_scale": COLUMN},
        {"weight.tensor_impl.int_data": codes(), "weight.tensor_impl.scale": COLUMN},
        {"weight.tensor_impl.packed_weight": codes(I32, 4, 4, 4, 4)},
    ],
    "quanto": [{"weight._data": codes(), "weight._scale": COLUMN}, {"weight._data._data": codes(U8, N // 2, N)}],
    "HQQ": [{"W_q": codes(U8), "scale": COLUMN, "zero": COLUMN}],
    "SVDQuant": [
        {"qweight": codes(I8, N, N // 2), "wscales": floats(1, N), "smooth_factor": floats(N)},
        {"qweight": codes(I8, N, N // 2), "wscales": floats(1, N), "wzeros": floats(1, N)},
    ],
    "FP-Quant": [{"qweight": codes(U8), "scales": codes(U8), "forward_hadamard_matrix": floats(32, 32)}],
    "GPTQ": [
        {"qweight": codes(I32, 8, N), "qzeros": codes(I32, 1, 8), "scales": floats(1, N), "g_idx": codes(I32, N)}
    ],
    "AWQ or GPTQ": [{"qweight": codes(I32, N, 8), "qzeros": codes(I32, 1, 8), "scales": floats(1, N)}],
    "GPTQ, AWQ or one": [{"qweight": codes(I32, N, 8), "scales": floats(1, N)}, {"qweight": codes(I32, N, 8)}],
    "EETQ": [{"qweight": codes(), "weight_scales": floats(N)}],
    "Marlin": [{"B": codes(I32, 4, N), "s": floats(1, N)}],
    "EXL2": [{"q_weight": codes(I32, 8, N), "q_scale": codes(I32, 1, 8), "q_groups": codes(torch.int16, 2)}],
    "EXL3": [{"trellis": codes(torch.int16, 4, 4, 64), "suh": floats(N), "svh": floats(N)}],
    "AQLM": [{"codes": codes(torch.int16, N, 8, 1), "codebooks": floats(1, 256, 1, 8), "scales": floats(N, 1, 1, 1)}],
    "HIGGS": [{"weight": codes(torch.int16), "scales": floats(N, 1), "tables": floats(256, 2)}],
    "QuIP#": [{"Qidxs": codes(torch.int16, N, 8), "SU": floats(N), "SV": floats(N)}],
    "VPTQ": [{"indices": codes(I32, 1, 8, N), "centroids.weight": floats(1, 512)}],
    "compressed-tensors": [
        {"weight_packed": codes(I32, N, 8), "weight_scale": floats(N, 1), "weight_shape": torch.tensor([N, N])},
        {"weight": codes(), "weight_scale": COLUMN, "weight_zero_point": codes(I8, N, 1)},
    ],
    "NVFP4 of compressed-tensors": [{"weight_packed": codes(U8, N, 32), "weight_global_scale": floats(1)}],
    "LLM.int8": [{"weight": codes(), "SCB": floats(N), "weight_format": codes(U8, 1)}],
    "ModelOpt before export": [{"weight": codes(), "weight_quantizer._scale": floats(1)}],
    "Quark": [{"weight": codes(), "weight_quantizer.scale": floats(1)}],
    "Q8 kernels": [{"weight": codes(), "scales": floats(N)}],
    "TensorRT-LLM": [{"weight": codes(), "weights_scaling_factor": floats(N)}],
    "MXFP4 of transformers": [
        {"gate_up_proj_blocks": codes(U8, 2, 8, 2, 16), "gate_up_proj_scales": codes(U8, 2, 8, 2)}
    ],
}
# Of nobody that the table names.
UNKNOWN = [
    {"weight": codes()},
    {"weight": codes(U8)},
    {"weight": codes(I32)},
    {"weight": codes(torch.int64)},
    {"weight": codes(), "absmax_of_rows": floats(N)},
    {"weight": codes(U8, N * N), "magnitude_scale": floats(N)},
    {"packed": codes(U8), "group_scales": floats(N, 4)},
    {"qw": codes(), "qw_scale": floats(N)},
    {"weight": codes(U8, 2, N, N)},
]
CASES = [(family, file) for family, files in FILES.items() for file in files]


def foreign_file(path: Path, layer: dict[str, torch.Tensor]) -> Path:
    """The layer beside one in 16 bits, which could be quantized as if it were the model."""
    plain = {"blocks.0.attn.q.weight": floats(N, N).bfloat16(), "blocks.0.norm.scale": torch.ones(N)}
    save_file({**plain, **{f"{LAYER}.{end}": tensor.clone() for end, tensor in layer.items()}}, path)
    return path


@pytest.mark.parametrize(("family", "layer"), CASES)
def test_a_family_is_named_with_what_reads_it_and_what_to_take(tmp_path, family, layer):
    path = foreign_file(tmp_path / "m.safetensors", layer)
    with open_source(path) as src, pytest.raises(InputFileError) as caught:
        stored_layers(src)
    text = str(caught.value)
    assert str(path) in text and f"this file is {family}" in text
    assert "16-bit model" in text or "export" in text
    (found,) = check_file(path).errors[-1:]
    assert found.code == "foreign" and f"this file is {family}" in found.message
    with open_source(path) as src:
        assert [f.message for f in repair(src).unfixed if f.code == "foreign"] == [found.message]


@pytest.mark.parametrize("layer", UNKNOWN)
def test_codes_of_nobody_known_are_refused_and_named(tmp_path, layer):
    path = foreign_file(tmp_path / "m.safetensors", layer)
    name = f"{LAYER}.{next(iter(layer))}"
    with open_source(path) as src, pytest.raises(InputFileError) as caught:
        stored_layers(src)
    assert name in str(caught.value) and "16-bit model" in str(caught.value)
    (found,) = check_file(path).errors
    assert found.code == "undescribed" and name in found.message
    with open_source(path) as src:
        assert [finding.code for finding in repair(src).unfixed] == ["undescribed"]


REFUSED = {
    "quantize": ["--format", "int8_rowwise"],
    "requantize": ["--format", "int8_rowwise"],
    "dequantize": [],
    "migrate": [],
    "migrate --to legacy": [],
    "repair": [],
    "cleanup": [],
    "merge lora": ["--lora", "LORA"],
    "bitsandbytes export": [],
    "bitsandbytes import": [],
    "calibrate": ["--simulate"],
    "template": [],
}


@pytest.mark.parametrize("layer", [FILES["SDNQ"][0], FILES["torchao"][0], FILES["MLX"][0], UNKNOWN[0]])
@pytest.mark.parametrize("command", REFUSED)
def test_every_command_refuses_and_leaves_nothing(tmp_path, capsys, command, layer):
    path, lora = foreign_file(tmp_path / "m.safetensors", layer), tmp_path / "l.safetensors"
    down, up = floats(4, N), floats(N, 4)
    save_file({"blocks.0.attn.q.lora_down.weight": down, "blocks.0.attn.q.lora_up.weight": up}, lora)
    before = sorted(tmp_path.iterdir())
    words, options = command.split(" --"), [str(lora) if word == "LORA" else word for word in REFUSED[command]]
    options += ["--to", "legacy"] if len(words) > 1 else []
    assert main([*words[0].split(), str(path), str(tmp_path / "out.safetensors"), *options]) == 1
    told = capsys.readouterr()
    assert "this file is" in told.out + told.err or f"{LAYER}.weight" in told.out + told.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("layer", [FILES["SDNQ"][0], FILES["torchao"][0], UNKNOWN[0]])
def test_inspect_and_verify_tell_it_once(tmp_path, capsys, layer):
    path = foreign_file(tmp_path / "m.safetensors", layer)
    assert main(["verify", str(path)]) == 1
    assert main(["inspect", str(path), "--json"]) == 0
    out = capsys.readouterr().out
    findings = json.loads(out[out.index("\n{") :])["findings"]
    assert len(findings) == 1 and findings[0]["severity"] == "error"


def test_plain_int8_rows_of_another_program_migrate_when_their_scale_is_named(tmp_path):
    path, out = foreign_file(tmp_path / "m.safetensors", FILES["SDNQ"][0]), tmp_path / "o.safetensors"
    assert main(["migrate", str(path), str(out), "--scale-name", "scale"]) == 0
    with open_source(out) as src:
        decoded = stored_layers(src)[LAYER].decode(src)
    assert torch.equal(decoded, codes().float() * COLUMN)


def test_naming_the_scale_does_not_pass_over_zero_points_or_low_rank_parts(tmp_path):
    for layer in FILES["SDNQ"][1:]:
        path = foreign_file(tmp_path / "m.safetensors", layer)
        assert main(["migrate", str(path), str(tmp_path / "o.safetensors"), "--scale-name", "scale"]) == 1
        assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("fmt", all_formats(), ids=lambda fmt: fmt.name)
def test_files_of_this_pack_are_of_no_family(tmp_path, fmt):
    model, out = tmp_path / "m.safetensors", tmp_path / "o.safetensors"
    save_file({"blocks.0.fc.weight": floats(256, 256).bfloat16()}, model)
    assert main(["quantize", str(model), str(out), "--format", fmt.name]) == 0
    with open_source(out) as src:
        assert recognise(src) is None and unread(src) == []


def test_integers_of_plain_models_are_no_codes(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(
        {
            "text_model.embeddings.position_ids": torch.arange(77, dtype=I32)[None],
            "logit_scale": torch.tensor(4.6),
            "blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64),
            "blocks.0.attn.logit_scale": torch.ones(8, 1, 1),
            "blocks.0.attn.q.weight": floats(N, N),
            "blocks.0.norm.query_norm.scale": torch.ones(N),
            "blocks.0.norm.num_batches_tracked": torch.tensor(3),
            "spiece_model": codes(U8, 1000),
        },
        path,
    )
    with open_source(path) as src:
        assert recognise(src) is None and unread(src) == [] and stored_layers(src) == {}


def test_every_family_of_the_table_is_tested(tmp_path):
    found = set()
    for _, layer in CASES:
        with open_source(foreign_file(tmp_path / "m.safetensors", layer)) as src:
            found.add(recognise(src).name)
    assert found == {family.name for family in FAMILIES if not family.plain}
