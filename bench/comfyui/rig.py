"""Servers and graphs for gpu.py: a real ComfyUI with this pack, on whatever device COMFYUI_ARGS says."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import comfy_server
import torch
from comfy_server import Graph, Server
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]

comfy_server.RUN_S = 150  # a workflow of this bench takes seconds; one that hangs must not hold up the others

MODEL = "trained_sd3"
CLASSES, SIDE = 10, 128  # the trained model's; its pictures are SIDE x SIDE
Row = Callable[..., None]

# Two nodes for the bench alone. One decodes a model's quantized weights, so that only the weights differ. The other
# waits for two samplers (ComfyUI's own node for that sits in a module with large requirements).
NODES = """
import torch
class QuantPressBenchDecode:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "decode", "test"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}
    def decode(self, model):
        for module in model.model.diffusion_model.modules():
            if hasattr(getattr(module, "weight", None), "_qdata"):
                weight = module.weight.dequantize().float()
                module.weight, module.layout_type = torch.nn.Parameter(weight, requires_grad=False), None
        return (model,)
class QuantPressBenchBoth:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "both", "test"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"first": ("LATENT",), "second": ("LATENT",)}}
    def both(self, first, second):
        return (second,)
NODE_CLASS_MAPPINGS = {c.__name__: c for c in (QuantPressBenchDecode, QuantPressBenchBoth)}
"""


def make_base(folder: Path, models: Mapping[str, Path]) -> Path:
    """A base folder with the pack, the bench's nodes, and links to the models (name without ending -> file)."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in (
        "custom_nodes/bench_nodes",
        "models/diffusion_models",
        "models/loras",
        "input",
        "output",
        "temp",
        "user",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "custom_nodes" / "ComfyUI-QuantPress").symlink_to(ROOT)
    (folder / "custom_nodes/bench_nodes/__init__.py").write_text(NODES, "utf-8")
    for name, path in models.items():
        shutil.copyfile(path, folder / f"models/diffusion_models/{name}.safetensors")
    return folder


class Drawing(Graph):
    """Graphs of the trained model.

    Node ids agree as long as graphs begin with the same calls. So ComfyUI's cache keeps what an earlier graph of the
    same beginning made. info: /object_info, for the defaults of our nodes' inputs.
    """

    def __init__(
        self, info: Mapping[str, Any], model: str = MODEL, side: int = SIDE, kind: str = "demo shapes"
    ) -> None:
        super().__init__()
        self.info, self.side, self.kind = info, side, kind
        self.original = self.unet(f"{model}.safetensors")
        self.negative = self.add("QuantPressTestConditioning", model=(self.original, 0), kind="zeros", seed=0)
        self._empty: dict[int, str] = {}
        self._positive: dict[int, str] = {}

    def add(self, kind: str, /, **inputs: Any) -> str:
        """Required inputs of our nodes that are not given take their defaults."""
        if kind.startswith("QuantPress") and kind in self.info:
            for name, spec in self.info[kind]["input"].get("required", {}).items():
                if name not in inputs and len(spec) > 1 and "default" in spec[1]:
                    inputs[name] = spec[1]["default"]
        return super().add(kind, **inputs)

    def empty(self, batch: int) -> str:
        if batch not in self._empty:
            self._empty[batch] = self.add("EmptySD3LatentImage", width=self.side, height=self.side, batch_size=batch)
        return self._empty[batch]

    def positive(self, label: int) -> str:
        if label not in self._positive:
            self._positive[label] = self.add(
                "QuantPressTestConditioning", model=(self.original, 0), kind=self.kind, seed=label
            )
        return self._positive[label]

    def draw(self, model: str, label: int, seed: int, steps: int, batch: int = 1) -> str:
        return self.add(
            "KSampler",
            model=(model, 0),
            positive=(self.positive(label), 0),
            negative=(self.negative, 0),
            latent_image=(self.empty(batch), 0),
            seed=seed,
            steps=steps,
            cfg=3.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )

    def part(
        self, model: str, label: int, seed: int, steps: int, latent: str, start: int, end: int, cfg: float
    ) -> str:
        """Steps start to end - 1 of `steps`, from a latent that earlier steps left."""
        return self.add(
            "KSamplerAdvanced",
            model=(model, 0),
            positive=(self.positive(label), 0),
            negative=(self.negative, 0),
            latent_image=(latent, 0),
            add_noise="disable" if start else "enable",
            noise_seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="simple",
            start_at_step=start,
            end_at_step=end,
            return_with_leftover_noise="enable",
        )

    def save(self, latent: str, name: str) -> str:
        return self.add("SaveLatent", samples=(latent, 0), filename_prefix=name)

    def capture(self, **settings: Any) -> str:
        return self.add("QuantPressCapture", model=(self.original, 0), **settings)

    def captured(self, capture: str, prompts: Sequence[tuple[int, int]], steps: int) -> str:
        """Sample (label, seed) with the captured model; a latent that waits for all."""
        last = None
        for label, seed in prompts:
            drawn = self.draw(capture, label, seed, steps)
            last = drawn if last is None else self.add("QuantPressBenchBoth", first=(last, 0), second=(drawn, 0))
        return last or self.empty(1)

    def calibration(self, capture: str, latent: str, save_as: str) -> str:
        collected = self.add("QuantPressCollect", latent=(latent, 0), capture=(capture, 1))
        self.add("QuantPressSaveCalibration", calibration=(collected, 0), name=save_as, overwrite=True)
        return collected

    def quantized(self, source: str, **recipe: Any) -> str:
        return self.add(
            "QuantPressQuantize", source=(source, 0), **{"scales": "absmax", "rounding": "nearest", **recipe}
        )

    def load(self, quantized: str, decoded: bool = False) -> str:
        model = self.add("QuantPressLoadQuantized", quantized=(quantized, 0))
        return self.add("QuantPressBenchDecode", model=(model, 0)) if decoded else model


def latents(server: Server, prefix: str) -> torch.Tensor:
    """The last latents that were saved under this prefix, float64."""
    return server.latent(prefix)


def snr_db(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Of everything together; infinite where they are equal."""
    return float(10 * torch.log10(reference.square().sum() / (reference - found).square().sum()))


def snr_each(reference: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """[B]: one per picture."""
    error = (reference - found).flatten(1).square().sum(1).clamp(min=1e-30)
    return 10 * torch.log10(reference.flatten(1).square().sum(1) / error)


def calibration_tensors(server: Server, name: str) -> dict[str, torch.Tensor]:
    return load_file(server.base / f"models/calibrations/{name}.safetensors")


def in_parallel(jobs: Mapping[str, Callable[[], None]], row: Row) -> list[BaseException]:
    """Run all at once; what fails becomes a row, and the rest goes on. Returns the errors."""
    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
        running = {name: pool.submit(job) for name, job in jobs.items()}
    return [error for name, future in running.items() if (error := _said(name, future.exception(), row)) is not None]


def one_by_one(jobs: Mapping[str, Callable[[], None]], row: Row) -> list[BaseException]:
    """Run one after the other; what fails becomes a row, and the rest goes on."""
    with ThreadPoolExecutor(1) as pool:
        outcomes = {name: pool.submit(job) for name, job in jobs.items()}
    return [error for name, future in outcomes.items() if (error := _said(name, future.exception(), row)) is not None]


def _said(name: str, error: BaseException | None, row: Row) -> BaseException | None:
    if error is not None:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
        row(failed=name, error=f"{type(error).__name__}: {str(error)[:600]}")
    return error
