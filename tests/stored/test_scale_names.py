"""FP8 weights whose scales another program named: decoded with them where that is certain, refused where it is not."""

import json
from pathlib import Path

import pytest
import torch
from comfyui_quantpress.cli.main import main
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import InputFileError, Remedy, RequestError
from comfyui_quantpress.quant_core.numerics.metrics import relative_error
from comfyui_quantpress.quant_core.pipeline.verify import check_file
from comfyui_quantpress.quant_core.stored.form import Form
from comfyui_quantpress.quant_core.stored.layers import stored_layers
from comfyui_quantpress.quant_core.tools.migrate import MigrateOptions, migrate
from comfyui_quantpress.quant_core.tools.repair import repair
from safetensors.torch import load_file, save_file

N, K, B = 256, 128, 64
LAYER = "blocks.0.fc"
CLEAR = (
    ".scale",
    ".scales",
    ".w_scale",
    ".weight.scale",
    ".weight_scales",
    ".scale_w",
    ".qscale",
    ".weight._scale",
    ".scale_inv",
    ".weight.scale_inv",
    ".weights_scaling_factor",
    ".dequant_scale",
)
SHAPES = ((), (1,), (1, 1), (N,), (N, 1), (N // B, K // B), (N // B, 1, K // B, 1), (N, K // B, 1))


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.02


def coded(w: torch.Tensor, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float8_e4m3fn):
    """(codes, scale): of the shape, which says by how many weights a scale is shared."""
    sizes = [size for size in shape if size != 1]
    rows = sizes[0] if sizes else 1
    cols = sizes[1] if len(sizes) > 1 else 1
    blocks = w.reshape(rows, N // rows, cols, K // cols)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / torch.finfo(dtype).max
    return (blocks / scale).reshape(N, K).to(dtype), scale.reshape(shape)


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def fp8_file(path: Path, end: str = ".scale", shape: tuple[int, ...] = (), **extra: torch.Tensor) -> Path:
    codes, scale = coded(weight(), shape)
    beside = {f"{LAYER}.{name}": tensor for name, tensor in extra.items()}
    return save(path, {f"{LAYER}.weight": codes, LAYER + end: scale, f"{LAYER}.bias": torch.ones(N), **beside})


def error_of(path: Path) -> str:
    with open_source(path) as src, pytest.raises(InputFileError) as caught:
        stored_layers(src)
    (problem,) = caught.value.problems
    assert (problem.setting, problem.remedy) == ("scale_name", Remedy.SAY_SCALE)
    return problem.text


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", CLEAR)
def test_a_scale_with_a_clear_name_and_an_exact_fit_decodes_its_weight(tmp_path, end, shape):
    with open_source(fp8_file(tmp_path / "m.safetensors", end, shape)) as src:
        (layer,) = stored_layers(src).values()
        assert layer.form is Form.OTHER_NAME and layer.names["weight_scale"] == LAYER + end
        assert relative_error(weight(), layer.decode(src)) < 0.04


def test_scales_of_16_bits_and_e5m2_codes_are_read_too(tmp_path):
    codes, scale = coded(weight(), dtype=torch.float8_e5m2)
    path = save(tmp_path / "m.safetensors", {f"{LAYER}.weight": codes, f"{LAYER}.scale": scale.bfloat16()})
    with open_source(path) as src:
        assert relative_error(weight(), stored_layers(src)[LAYER].decode(src)) < 0.08


def test_every_command_reads_such_a_file_with_its_scales(tmp_path):
    source, out = fp8_file(tmp_path / "m.safetensors"), tmp_path / "out.safetensors"
    truth = save(tmp_path / "t.safetensors", {f"{LAYER}.weight": weight(), f"{LAYER}.bias": torch.ones(N)})
    with open_source(source) as src:
        expected = stored_layers(src)[LAYER].decode(src)
    for command in (["quantize", "--format", "int8_rowwise"], ["requantize", "--format", "int8_rowwise"]):
        assert main([command[0], str(source), str(out), *command[1:], "--overwrite"]) == 0
        assert main(["verify", str(out), "--against", str(truth)]) == 0
        assert LAYER + ".scale" not in load_file(out)
    assert main(["dequantize", str(source), str(out), "--dtype", "fp32", "--overwrite"]) == 0
    written = load_file(out)
    assert torch.equal(written[f"{LAYER}.weight"], expected) and f"{LAYER}.scale" not in written
    assert main(["migrate", str(source), str(out), "--overwrite"]) == 0
    written, before = load_file(out), load_file(source)
    assert torch.equal(written[f"{LAYER}.weight_scale"], before[f"{LAYER}.scale"])
    assert written[f"{LAYER}.weight"].dtype == torch.float8_e4m3fn and f"{LAYER}.scale" not in written
    assert main(["verify", str(out), "--against", str(truth)]) == 0


def test_verify_repair_and_inspect_name_the_scales_and_the_way_out(tmp_path, capsys):
    path = fp8_file(tmp_path / "m.safetensors")
    (found,) = check_file(path).errors
    assert found.code == "scale-name" and f"{LAYER}.scale" in found.message and "migrate" in found.message
    with open_source(path) as src:
        assert [finding.code for finding in repair(src).unfixed] == ["scale-name"]
    assert main(["inspect", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["quantized_layers"] == 1 and [finding["code"] for finding in shown["findings"]] == ["scale-name"]


def test_the_scale_of_the_inputs_comes_along_and_is_no_scale_of_the_weight(tmp_path):
    for other in ("scale_input", "input_scale"):
        with open_source(fp8_file(tmp_path / "m.safetensors", **{other: torch.tensor(0.5)})) as src:
            assert stored_layers(src)[LAYER].input_scale(src) == 0.5
    with open_source(fp8_file(tmp_path / "m.safetensors", ".act_scale")) as src:
        assert stored_layers(src) == {}


def test_fp8_weights_without_scales_stay_what_they_are(tmp_path):
    plain = {
        f"{LAYER}.weight": weight().to(torch.float8_e4m3fn),
        f"{LAYER}.bias": torch.ones(N),
        "blocks.0.fc_norm.scale": torch.ones(N),  # of another layer, whose name only begins alike
        "blocks.0.norm.weight": torch.ones(N).to(torch.float8_e4m3fn),
        "scale": torch.tensor(0.5),
    }
    path, out = save(tmp_path / "m.safetensors", plain), tmp_path / "o.safetensors"
    assert check_file(path).errors == ()
    assert main(["dequantize", str(path), str(out)]) == 0
    assert torch.equal(load_file(out)[f"{LAYER}.weight"], plain[f"{LAYER}.weight"].bfloat16())


@pytest.mark.parametrize(
    ("end", "scale", "why"),
    [
        (".scale", torch.tensor(512.0), "divides"),
        (".scale", torch.full((N, 1), 300.0), "divides"),
        (".scale", torch.full((N // 2,), 0.01), "dtype and shape"),
        (".scale", torch.full((K,), 0.01), "dtype and shape"),
        (".scale", torch.tensor(-0.1), "negative"),
        (".scale", torch.tensor(float("nan")), "NaN"),
        (".gamma", torch.full((N,), 0.01), "does not say"),
        (".gamma", torch.tensor(0.01), "does not say"),
        (".smooth_scale", torch.full((K,), 0.01), "does not say"),
        ("_scale", torch.tensor(0.01), "does not say"),
        (".scales", torch.full((N, K // 32), 120, dtype=torch.uint8), "order"),
    ],
)
def test_what_is_not_certain_is_refused_and_named(tmp_path, end, scale, why):
    path = save(tmp_path / "m.safetensors", {f"{LAYER}.weight": coded(weight())[0], LAYER + end: scale})
    text = error_of(path)
    assert f"{LAYER}.weight (F8_E4M3 [{N}, {K}])" in text and LAYER + end in text and why in text
    (found,) = check_file(path).errors
    assert found.code == "scale-name" and LAYER + end in found.message


def test_two_scales_or_a_weight_that_is_no_matrix_are_refused(tmp_path):
    assert "only one" in error_of(fp8_file(tmp_path / "m.safetensors", w_scale=torch.tensor(0.01)))
    codes = torch.ones(4, N, K).to(torch.float8_e4m3fn)
    for name in ("experts.weight", "experts.gate_up_proj"):
        end = name.removesuffix(".weight") + ("_scale" if "gate" in name else ".scale")
        text = error_of(save(tmp_path / "m.safetensors", {name: codes, end: torch.full((4,), 0.01)}))
        assert "two dimensions" in text and name in text


@pytest.mark.parametrize("command", ["quantize", "requantize", "dequantize", "migrate"])
def test_no_command_writes_a_file_whose_scales_are_not_certain(tmp_path, capsys, command):
    path = fp8_file(tmp_path / "m.safetensors", gamma=torch.full((N,), 0.01))
    before, options = sorted(tmp_path.iterdir()), []
    if command in ("quantize", "requantize"):
        options = ["--format", "int8_rowwise"]
    assert main([command, str(path), str(tmp_path / "out.safetensors"), *options]) == 1
    told = capsys.readouterr().err
    assert f"{LAYER}.gamma" in told and "--scale-name" in told and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("said", ["gamma", ".gamma", "fc.gamma"])
def test_migrate_takes_the_name_that_the_user_says(tmp_path, said):
    codes, scale = coded(weight(), (N, 1))
    path = save(tmp_path / "m.safetensors", {f"{LAYER}.weight": codes, f"{LAYER}.gamma": scale})
    with open_source(path) as src:
        migrate(src, MigrateOptions(scale_name=said)).apply(tmp_path / "o.safetensors")
    assert check_file(tmp_path / "o.safetensors").errors == ()
    with open_source(tmp_path / "o.safetensors") as src:
        assert relative_error(weight(), stored_layers(src)[LAYER].decode(src)) < 0.04


def test_migrate_takes_int8_rows_when_the_user_names_their_scale(tmp_path):
    scale = weight().abs().amax(dim=1, keepdim=True) / 127
    codes = (weight() / scale).round().to(torch.int8)
    path = save(tmp_path / "m.safetensors", {f"{LAYER}.weight": codes, f"{LAYER}.row_scale": scale})
    assert main(["migrate", str(path), str(tmp_path / "o.safetensors"), "--scale-name", "row_scale"]) == 0
    with open_source(tmp_path / "o.safetensors") as src:
        (layer,) = stored_layers(src).values()
        assert layer.format.name == "int8_rowwise" and relative_error(weight(), layer.decode(src)) < 0.02


def test_a_name_that_no_scale_has_is_an_error(tmp_path):
    with open_source(fp8_file(tmp_path / "m.safetensors")) as src, pytest.raises(RequestError) as caught:
        migrate(src, MigrateOptions(scale_name="gamma"))
    (problem,) = caught.value.problems
    assert problem.setting == "scale_name" and "'gamma'" in problem.text


def test_a_named_scale_that_does_not_fit_is_an_error(tmp_path):
    path = save(tmp_path / "m.safetensors", {f"{LAYER}.weight": coded(weight())[0], f"{LAYER}.g": torch.ones(7)})
    with open_source(path) as src, pytest.raises(InputFileError, match="dtype and shape"):
        migrate(src, MigrateOptions(scale_name="g"))
