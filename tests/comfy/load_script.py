"""Run by ComfyUI's Python: loads files with the stock loaders and samples them; no server, no custom nodes.

    load_script.py COMFYUI_DIR JOBS.json        writes what the JSON's "out" names: latents, and beside it FILE.json
The JSON: out; pack (its folder, or null for a ComfyUI without it); conditioning; fp8 (true: pretend that this CPU
multiplies in fp8, so that inputs are quantized, too); jobs. A job: id, file, and where wanted checkpoint, loras [file,
strength, how], partly (all layers stay offloaded), probe (latents to measure single steps on), pictures (how many
latents; 1).
"""

import asyncio
import json
import sys

comfyui, jobs_file = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu", "--disable-all-custom-nodes"]

import comfy.options  # noqa: E402
import torch  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import safetensors.torch  # noqa: E402
from comfy_kitchen.tensor import QuantizedTensor  # noqa: E402

import nodes  # noqa: E402

LOAD_MODELS = comfy.model_management.load_models_gpu
SEED, STEPS, CFG = 3, 2, 1.0
PROBED = (1.0, 0.75, 0.5, 0.25)
WARM_CIRCLE, COOL_RING, NULL = 0, 9, 10


def conditioning(table, row):
    return [[table["context"][row : row + 1], {"pooled_output": table["pooled"][row : row + 1]}]]


def load(job):
    """The model as stock ComfyUI loads it, and with the LoRAs that a stock node would add."""
    if job.get("checkpoint"):
        model, _, vae, _ = comfy.sd.load_checkpoint_guess_config(job["file"], output_vae=True, output_clip=False)
        pixels = vae.decode(torch.zeros(1, 16, 8, 8))
        assert bool(torch.isfinite(pixels).all()) and pixels.shape[1:3] == (64, 64)
    else:
        model = comfy.sd.load_diffusion_model(job["file"])
    for file, strength, how in job.get("loras", ()):
        lora = comfy.utils.load_torch_file(file, safe_load=True)
        add = {"stock": comfy.sd.load_lora_for_models, "bypass": comfy.sd.load_bypass_lora_for_models}[how]
        model, _ = add(model, None, lora, strength, 0)
    return model


def sample(model, table, pictures):
    latent = torch.zeros(pictures, 16, 8, 8)
    noise = comfy.sample.prepare_noise(latent, SEED)
    return comfy.sample.sample(
        model,
        noise,
        STEPS,
        CFG,
        "euler",
        "simple",
        conditioning(table, WARM_CIRCLE),
        conditioning(table, NULL),
        latent,
        disable_pbar=True,
        seed=SEED,
    )


def velocities(model, table, latents):
    """The model's outputs at four noise levels: what one Euler step down to 0 subtracts."""
    found, inner = [], model.model
    sampler = comfy.samplers.sampler_object("euler")
    for level in PROBED:
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(SEED))
        noisy = level * noise + (1 - level) * inner.process_latent_in(latents)
        out = comfy.sample.sample_custom(
            model,
            noise,
            1.0,
            sampler,
            torch.tensor([level, 0.0]),
            conditioning(table, COOL_RING),
            conditioning(table, NULL),
            latents,
            disable_pbar=True,
            seed=SEED,
        )
        found.append((noisy - inner.process_latent_in(out)) / level)
    return torch.cat(found)


def run(job, table):
    """(tensors, what is known of the model)."""
    model = load(job)
    if job.get("partly"):
        model.load(torch.device("cpu"), lowvram_model_memory=1, full_load=False)
        assert model.model.model_lowvram
        comfy.model_management.load_models_gpu = lambda *args, **kwargs: None  # the sampler would load it wholly
    layouts = [
        module.weight._layout_cls
        for module in model.model.diffusion_model.modules()
        if isinstance(getattr(module, "weight", None), QuantizedTensor)
    ]
    found = {job["id"]: sample(model, table, job.get("pictures", 1))}
    if job.get("probe"):
        found[job["id"] + "/velocities"] = velocities(
            model, table, safetensors.torch.load_file(job["probe"])["latent"]
        )
    comfy.model_management.load_models_gpu = LOAD_MODELS
    comfy.model_management.unload_all_models()
    return found, {"quantized": len(layouts), "layouts": sorted(set(layouts))}


def main():
    with open(jobs_file, encoding="utf-8") as file:
        work = json.load(file)
    if work["pack"]:
        assert asyncio.run(nodes.load_custom_node(work["pack"]))
    if work.get("fp8"):
        comfy.model_management.supports_fp8_compute = lambda *args: True
    table, latents, known = safetensors.torch.load_file(work["conditioning"]), {}, {}
    with torch.inference_mode():
        for job in work["jobs"]:
            try:
                tensors, known[job["id"]] = run(job, table)
                latents |= tensors
            except Exception as error:  # whatever a broken file does to a loader is this test's matter
                known[job["id"]] = {"error": f"{type(error).__name__}: {error}"}
    safetensors.torch.save_file(latents, work["out"])
    with open(work["out"] + ".json", "w", encoding="utf-8") as file:
        json.dump(known, file)


main()
