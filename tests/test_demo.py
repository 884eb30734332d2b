"""The demo: relations between formats, determinism, and that sheet, CSV and JSON hold what was measured."""

import csv
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from comfyui_quantpress.demo.autoencoder import decode, load_decoder
from comfyui_quantpress.demo.load import DEQUANTIZED, LAYOUT, PLAIN, load_model
from comfyui_quantpress.demo.measure import make_probe, output_snr_db, picture_psnr_db, probed_steps
from comfyui_quantpress.demo.run import ASSETS, MODEL, DemoSettings, draw, run_demo
from comfyui_quantpress.demo.sampler import load_conditioning, sample, simple_sigmas, starting_noise
from comfyui_quantpress.demo.sheet import difference, sheet_size
from comfyui_quantpress.quant_core.errors import InputFileError, OutputError, RequestError
from comfyui_quantpress.quant_core.formats import all_formats
from comfyui_quantpress.quant_core.pipeline.request import Request
from comfyui_quantpress.quant_core.pipeline.run import convert
from comfyui_quantpress.quant_core.policy.general import Policy
from comfyui_quantpress.quant_core.policy.recipe import Recipe
from PIL import Image
from safetensors.torch import save_file

SETTINGS = DemoSettings(labels=(0, 6), steps=4)
FORMATS = ("nvfp4", "int8_rowwise")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The layers are small: threads gain little here, and lose a lot on a machine that is busy with other things."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def conditioning():
    return load_conditioning(ASSETS / "conditioning.safetensors")


@pytest.fixture(scope="module")
def probe(original, conditioning):
    """One step, every class, from pure noise."""
    return make_probe(original.model, conditioning, (0,), 1, 1.0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(result, every progress event) of a short run."""
    events = []
    result = run_demo(tmp_path_factory.mktemp("demo"), FORMATS, seeds=(0,), progress=events.append, settings=SETTINGS)
    return result, events


# --- the model and the sampler --------------------------------------------------------------------------------------


def test_pictures_are_those_that_comfyui_draws(original, conditioning):
    """Mean colour of each quarter of the cool-side star, KSampler seed 3, as ComfyUI 0.29.0 drew it on a CPU."""
    of_comfyui = [
        [[0.7543, 0.6864, 0.6729], [0.7544, 0.6776, 0.6616]],
        [[0.7481, 0.6780, 0.6542], [0.7208, 0.6143, 0.5354]],
    ]
    latents = sample(original.model, conditioning, [3], starting_noise(0, [3]), steps=20, cfg=3.0)[-1]
    picture = decode(load_decoder(ASSETS / "tiny_taesd.safetensors"), latents)[0].permute(1, 2, 0).numpy()
    quarters = picture.reshape(2, 64, 2, 64, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(quarters, of_comfyui, atol=1e-3)


def test_original_sampled_twice_is_bit_identical(original, conditioning):
    once, again = (draw(original.model, conditioning, 5, SETTINGS) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, draw(original.model, conditioning, 6, SETTINGS))


def test_noise_of_a_picture_does_not_depend_on_its_batch():
    assert torch.equal(starting_noise(7, [1, 4])[1:], starting_noise(7, [4]))


@pytest.mark.parametrize("steps", [1, 4, 7, 20, 1000])
def test_sigmas_fall_from_one_to_zero(steps):
    sigmas = simple_sigmas(steps)
    assert len(sigmas) == steps + 1 and sigmas[0] == 1.0 and sigmas[-1] == 0.0
    assert all(later < earlier for earlier, later in pairwise(sigmas))


def test_original_has_no_quantized_layers(original):
    assert original.layers == {} and original.runs_through == PLAIN


# --- what is measured -----------------------------------------------------------------------------------------------


def test_identical_pictures_and_outputs_have_infinite_ratios():
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert picture_psnr_db(x, x) == output_snr_db(x, x) == math.inf


def test_known_errors_have_known_ratios():
    x = torch.ones(1, 3, 4, 4)
    assert picture_psnr_db(x, x - 0.1) == pytest.approx(20.0, abs=1e-4)
    assert output_snr_db(x, x * 1.01) == pytest.approx(40.0, abs=1e-2)


def test_broken_output_is_infinitely_bad():
    x = torch.ones(4)
    broken = torch.tensor([1.0, math.nan, 1.0, 1.0])
    assert output_snr_db(x, broken) == picture_psnr_db(x, broken) == -math.inf


def test_probed_steps_are_spread_over_the_way():
    assert probed_steps(20) == (0, 5, 10, 15)
    assert probed_steps(2) == (0, 1)


def test_original_probed_with_itself_is_identical(original, conditioning, probe):
    assert probe.snr_db(original.model, conditioning) == math.inf


def test_int8_per_row_is_closer_to_the_original_than_nvfp4(demo):
    rows = {row.format: row for row in demo[0].rows}
    close, far = rows["int8_rowwise"], rows["nvfp4"]
    for measure in ("weight_snr_db", "output_snr_db", "latent_snr_db", "picture_psnr_db"):
        assert getattr(far, measure) + 6 < getattr(close, measure) < math.inf
    assert far.bits_per_weight < 5 < 8 < close.bits_per_weight < 9
    assert far.file_bytes < close.file_bytes < demo[0].original_bytes


@pytest.mark.parametrize("fmt", all_formats(), ids=lambda fmt: fmt.name)
def test_every_format_loads_and_draws_nearly_the_same_velocity(fmt, probe, conditioning, tmp_path):
    path = tmp_path / "model.safetensors"
    report = convert(
        Request(MODEL, path, Recipe(fmt), Policy(only=(r"joint_blocks\.1\.x_block\.(attn|mlp)",)), device="cpu")
    )
    loaded = load_model(path)
    assert sorted(loaded.layers) == sorted(layer.layer for layer in report.quantized)
    assert len(loaded.layers) == 4 and loaded.runs_through in (LAYOUT, DEQUANTIZED)
    assert 20 < probe.snr_db(loaded.model, conditioning) < math.inf


# --- what is written ------------------------------------------------------------------------------------------------


def test_rows_come_in_the_order_asked_for_and_every_layer_is_counted(demo):
    assert tuple(row.format for row in demo[0].rows) == FORMATS
    for row in demo[0].rows:
        assert row.quantized_layers + row.kept_layers == 44
        assert sum(row.kept.values()) == row.kept_layers and row.quantized_layers > 20


def test_progress_tells_the_stages_in_order_and_every_row_once(demo):
    result, events = demo
    per_format = ["quantize", "verify", "sample", "row"]
    assert [event.stage for event in events] == ["original", *per_format * len(FORMATS), "write"]
    assert tuple(event.row for event in events if event.row) == result.rows


def test_csv_and_json_agree_with_the_rows(demo):
    result, _ = demo
    in_json = json.loads(result.json.read_text(encoding="utf-8"))["rows"]
    with result.csv.open(encoding="utf-8", newline="") as file:
        in_csv = list(csv.DictReader(file))
    assert len(in_csv) == len(in_json) == len(result.rows)
    for line, entry, row in zip(in_csv, in_json, result.rows, strict=True):
        assert list(line) == list(entry)
        for key in entry:
            assert entry[key] == getattr(row, key)
            if key != "kept":
                assert line[key] == str(entry[key])
        assert line["kept"] == "; ".join(f"{count} {why}" for why, count in row.kept.items())


def test_sheet_has_the_right_size_and_shows_pictures(demo):
    image = np.asarray(Image.open(demo[0].sheet).convert("RGB")).astype(int)
    assert image.shape == (*reversed(sheet_size(columns=2, groups=2, rows=2)), 3)
    thumbs = image[128:224, 380:476], image[290:386, 380:476]
    for thumb in thumbs:
        assert thumb.std() > 5
    # the first format under the first heading is int8 per row: close, but not the same picture
    assert 0 < np.abs(thumbs[0] - thumbs[1]).mean() < 20


def test_difference_is_black_where_nothing_changed_and_clipped():
    x = torch.zeros(1, 3, 2, 2)
    y = x.clone()
    y[0, 0, 0, 0], y[0, 1, 0, 0] = 0.05, 0.9
    shown = difference(x, y)
    assert shown[0, 0, 0, 0] == pytest.approx(0.4) and shown[0, 1, 0, 0] == 1.0
    assert torch.count_nonzero(shown) == 2


def test_a_second_run_over_the_first_gives_the_same_figures(demo):
    result, _ = demo
    again = run_demo(result.sheet.parent, FORMATS[:1], seeds=(0,), settings=SETTINGS)
    timed = {"quantize_seconds", "sample_seconds"}
    for field in set(type(result.rows[0]).__dataclass_fields__) - timed:
        assert getattr(again.rows[0], field) == getattr(result.rows[0], field)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_wrong_requests_are_refused_before_anything_is_written(tmp_path):
    for wrong in ({"formats": ["int9"]}, {"formats": []}, {"seeds": ()}, {"settings": DemoSettings(steps=0)}):
        with pytest.raises(RequestError):
            run_demo(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="out: the folder cannot be made"):
        run_demo(tmp_path / "out", ["int8_rowwise"])


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"blocks.0.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(InputFileError, match="no SD3-type MMDiT"):
        load_model(path)
