"""What the tools write, in the stock loaders.

Baked LoRAs, the residual LoRA, and a quantized model: put back into its checkpoint, requantized, joined from shards.

One-step errors: the model's outputs at four noise levels of two latents, against the 16-bit model's.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from comfy_server import COMFYUI, PYTHON, ROOT, missing
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.formats import get_format
from comfyui_quantpress.quant_core.names.prefixes import MODEL_PREFIX
from comfyui_quantpress.quant_core.pipeline.report import RunReport
from comfyui_quantpress.quant_core.pipeline.request import Request
from comfyui_quantpress.quant_core.pipeline.run import convert
from comfyui_quantpress.quant_core.policy.recipe import Recipe, parse_recipe
from comfyui_quantpress.quant_core.tools.lora import bake
from comfyui_quantpress.quant_core.tools.merge import extract, insert, join, split
from comfyui_quantpress.quant_core.tools.migrate import migrate
from comfyui_quantpress.quant_core.tools.requantize import requantize
from comfyui_quantpress.quant_core.tools.to_legacy import to_legacy
from loading import Loaded, start
from safetensors.torch import load_file, save_file

MODEL, VAE = ROOT / "assets/tiny_mmdit_256.safetensors", ROOT / "assets/tiny_taesd.safetensors"
FORMATS = ("float8_e4m3fn", "nvfp4", "bnb_nf4", "int8_blockwise")
RESIDUAL, RANK = ("nvfp4", "bnb_nf4"), 32
STRENGTH, SIZE, LORA_RANK = 0.8, 0.1, 16


@dataclass(frozen=True, slots=True)
class Results:
    found: Loaded
    reports: dict[str, RunReport]
    folder: Path

    def error(self, job: str, reference: str) -> float:
        return self.found.difference(f"{job}/velocities", f"{reference}/velocities")


def write_lora(path: Path) -> Path:
    """Random, and so large that it changes each attention and MLP weight by a tenth. alpha is half the rank."""
    tensors, generator = {}, torch.Generator().manual_seed(4)
    for name, w in load_file(MODEL).items():
        if w.dim() == 2 and ".x_block." in name and "adaLN" not in name:
            up, down = (
                torch.randn(size, generator=generator) for size in ((w.shape[0], LORA_RANK), (LORA_RANK, w.shape[1]))
            )
            up *= SIZE * w.float().norm() / (up @ down).norm() / (STRENGTH * 0.5)
            base = "diffusion_model." + name.removesuffix(".weight")
            tensors |= {
                f"{base}.lora_up.weight": up,
                f"{base}.lora_down.weight": down,
                f"{base}.alpha": torch.tensor(LORA_RANK / 2),
            }
    save_file(tensors, path)
    return path


def write_legacy_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint with its model as legacy fp8_scaled, and what migrating makes of it."""
    before, after, native = (folder / f"legacy-{name}.safetensors" for name in ("before", "after", "native"))
    with (
        open_source(folder / "whole.safetensors") as whole,
        open_source(folder / "float8_e4m3fn.safetensors") as model,
    ):
        insert(whole, model).apply(native)
    with open_source(native) as src:
        to_legacy(src).apply(before)
    with open_source(before) as src:
        migrate(src).apply(after)
    return [before, after]


def write_checkpoint(folder: Path, fmt: str) -> Path:
    """A full checkpoint (model, VAE, no text encoder) whose model was taken out, quantized and put back."""
    whole, model, quantized = (
        folder / "whole.safetensors",
        folder / "model.safetensors",
        folder / f"put-back-{fmt}.safetensors",
    )
    if not whole.exists():
        save_file(
            {f"{MODEL_PREFIX}{k}": t for k, t in load_file(MODEL).items()}
            | {f"first_stage_model.{k}": t for k, t in load_file(VAE).items()},
            whole,
        )
        with open_source(whole) as src:
            extract(src).apply(model)
    with ExitStack() as stack:
        convert(Request(model, folder / f"alone-{fmt}.safetensors", Recipe(get_format(fmt)), device="cpu"))
        parts = [stack.enter_context(open_source(path)) for path in (whole, folder / f"alone-{fmt}.safetensors")]
        insert(*parts).apply(quantized)
    return quantized


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    if missing():
        pytest.skip(missing())
    folder = tmp_path_factory.mktemp("sampling")
    probe = folder / "probe.safetensors"
    save_file({"latent": torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.7}, probe)
    lora, baked = write_lora(folder / "lora.safetensors"), folder / "baked.safetensors"
    with open_source(MODEL) as src, open_source(lora) as part:
        bake(src, [(part, STRENGTH)]).apply(baked)
    jobs = [
        {"id": "bf16", "file": MODEL},
        {"id": "bf16+lora", "file": MODEL, "loras": [[lora, STRENGTH, "stock"]]},
        {"id": "baked", "file": baked},
    ]
    reports = {}
    for fmt in FORMATS:
        before, after = folder / f"{fmt}.safetensors", folder / f"{fmt}-baked.safetensors"
        residual = folder / f"{fmt}-residual.safetensors" if fmt in RESIDUAL else None
        options = {"residual_rank": RANK} if residual else {}
        reports[fmt] = convert(
            Request(
                MODEL, before, parse_recipe(get_format(fmt), options=options), device="cpu", residual_lora=residual
            )
        )
        convert(Request(baked, after, Recipe(get_format(fmt)), device="cpu"))
        jobs += [
            {"id": fmt, "file": before},
            {"id": f"{fmt} of baked", "file": after},
            {"id": f"{fmt}+lora", "file": before, "loras": [[lora, STRENGTH, "stock"]]},
        ]
        if residual:
            jobs += [
                {
                    "id": f"{fmt}+residual {how}",
                    "file": before,
                    "loras": [[residual, 1.0, how.removesuffix(" partly")]],
                    "partly": how.endswith("partly"),
                }
                for how in ("stock", "stock partly", "bypass")
            ]
    for fmt in RESIDUAL:
        jobs += [
            {"id": f"{fmt} put back", "file": write_checkpoint(folder, fmt), "checkpoint": True},
            {"id": f"{fmt} alone", "file": folder / f"alone-{fmt}.safetensors"},
        ]
    jobs += [{"id": path.stem, "file": path, "checkpoint": True} for path in write_legacy_checkpoints(folder)]
    requantize(
        Request(
            folder / "int8_blockwise.safetensors",
            folder / "requantized.safetensors",
            Recipe(get_format("nvfp4")),
            device="cpu",
        )
    )
    with open_source(folder / "nvfp4.safetensors") as src:
        assert len(split(src, folder / "nvfp4.safetensors.index.json", 4_000_000)) > 2
    with open_source(folder / "nvfp4.safetensors.index.json") as src:
        join(src).apply(folder / "joined.safetensors")
    named = folder / "diffusers.safetensors"
    subprocess.run(
        [PYTHON, ROOT / "tests/comfy/diffusers_model.py", COMFYUI, MODEL, named],
        check=True,
        capture_output=True,
        timeout=120,
    )
    reports["diffusers"] = convert(
        Request(named, folder / "diffusers-fp8.safetensors", Recipe(get_format("float8_e4m3fn")), device="cpu")
    )
    names = ("requantized", "joined", "diffusers", "diffusers-fp8")
    jobs += [{"id": name, "file": folder / f"{name}.safetensors"} for name in names]
    yield Results(
        start("sampling", folder, [job | {"probe": probe} for job in jobs], pack=True).result(), reports, folder
    )
    shutil.rmtree(folder)


def test_a_baked_lora_is_what_the_stock_loader_makes_of_it(results):
    assert results.error("bf16+lora", "bf16") > 0.03  # the LoRA changes the outputs
    assert results.error("baked", "bf16+lora") < 0.005  # rounding to bf16


@pytest.mark.parametrize("fmt", FORMATS)
def test_baking_before_quantizing_beats_applying_the_lora_to_quantized_weights(results, fmt):
    """And is as good as the format is without any LoRA."""
    baked, applied, alone = (
        results.error(f"{fmt} of baked", "bf16+lora"),
        results.error(f"{fmt}+lora", "bf16+lora"),
        results.error(fmt, "bf16"),
    )
    assert baked < 0.9 * applied and baked < 1.3 * alone


@pytest.mark.parametrize("fmt", RESIDUAL)
def test_a_model_put_back_into_its_checkpoint_is_what_the_stock_checkpoint_loader_takes(results, fmt):
    """load_script.py has decoded a latent with the checkpoint's VAE as well.

    Kept weights are copied from other alignments.
    """
    found = results.found
    assert found.difference(f"{fmt} put back", f"{fmt} alone") < 1e-4
    assert (
        found.known[f"{fmt} put back"] == found.known[f"{fmt} alone"] and found.known[f"{fmt} alone"]["quantized"] > 20
    )
    with (
        open_source(results.folder / "whole.safetensors") as one,
        open_source(results.folder / f"put-back-{fmt}.safetensors") as two,
    ):
        names = [name for name in one.tensors if name.startswith("first_stage_model.")]
        assert len(names) > 100 and all(torch.equal(one.read_bytes(name), two.read_bytes(name)) for name in names)


def test_a_legacy_checkpoint_samples_as_before_when_it_is_migrated(results):
    found = results.found
    assert found.difference("legacy-after", "legacy-before") == 0
    assert found.known["legacy-after"] == found.known["legacy-before"] == found.known["float8_e4m3fn"]


def test_requantizing_adds_the_other_formats_error_and_little_more(results):
    assert results.error("requantized", "bf16") < 1.1 * results.error("nvfp4", "bf16")
    assert results.found.known["requantized"] == results.found.known["nvfp4"]


def test_shards_put_together_are_the_model_that_was_split(results):
    assert results.error("joined", "nvfp4") < 1e-6 and results.found.known["joined"] == results.found.known["nvfp4"]


def test_a_model_under_diffusers_names_loads_in_16_bits_and_is_lost_when_it_is_quantized(results):
    """ComfyUI's loader says nothing; the conversion has warned. If this fails, a newer ComfyUI may have learned it."""
    assert results.error("diffusers", "bf16") < 1e-4
    assert results.error("diffusers-fp8", "bf16") > 0.5 and results.found.known["diffusers-fp8"]["quantized"] == 0
    assert any("diffusers' names (SD3)" in str(warning) for warning in results.reports["diffusers"].warnings)


@pytest.mark.parametrize("fmt", RESIDUAL)
def test_a_residual_lora_helps_where_it_stays_apart_and_harms_where_it_is_rounded_in(results, fmt):
    """The bypass loader, and the stock loader on offloaded layers, add it to float weights or outputs.

    On resident layers the stock loader rounds the sum into the format again, by chance. That costs more than the LoRA
    gives.
    """
    alone, bypass, offloaded, merged = (
        results.error(job, "bf16")
        for job in (fmt, f"{fmt}+residual bypass", f"{fmt}+residual stock partly", f"{fmt}+residual stock")
    )
    layers = results.reports[fmt].quantized
    predicted = sum(layer.residual_error for layer in layers) / sum(layer.weight_error for layer in layers)
    assert predicted < 0.9 and bypass / alone == pytest.approx(predicted, abs=0.08)
    assert offloaded == pytest.approx(bypass, rel=0.02)
    assert merged > 1.1 * alone
