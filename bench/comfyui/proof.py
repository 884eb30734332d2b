"""What a calibration captured by the nodes is worth, through the nodes: nearest, search and gptq side by side.

Every picture is drawn by ComfyUI's KSampler; one step is a KSamplerAdvanced from the unquantized model's own latents,
so that both start from the same ones. Velocity SNR: over all pictures and probed steps together. Latent SNR: per
picture after all steps, mean and spread. Calibration uses seeds below 1000, judging seeds from 1000 on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comfyui_quantpress.demo.sampler import simple_sigmas
from rig import CLASSES, MODEL, Drawing, Row, Server, in_parallel, latents, make_base, one_by_one, snr_each

FORMATS = (
    "float8_e4m3fn",
    "float8_e4m3fn_blockwise",
    "int8_blockwise",
    "int8_rowwise",
    "int8_convrot",
    "nvfp4",
    "bnb_nf4",
    "convrot_w4a4",
)
SEEN = (0, 1, 2, 3, 5, 6, 7, 8)  # classes of the calibration; 4 and 9 are held out
AUTO = {"scales": "auto", "rounding": "auto", "bias_correction": True}
METHODS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "search": {"scales": "search"},
    "gptq": AUTO,
    "gptq, no bias": {**AUTO, "bias_correction": False},
    "gptq + input scales": {**AUTO, "input_scales": True},
    "gptq in order": AUTO,
}
SCALE, SHIFT = 1.5305, 0.0609  # of SD3's latent format


@dataclass(frozen=True, slots=True)
class Size:
    """How much of it.

    prompts: pictures of the calibration; batch: judged pictures per class; probed: one-step looks.
    """

    classes: int = CLASSES
    batch: int = 32
    steps: int = 20
    prompts: int = 40
    probed: tuple[int, ...] = (0, 5, 10, 15)


def prompts(count: int) -> list[tuple[int, int]]:
    """(class, seed): each class once before any comes again."""
    return [(SEEN[i % len(SEEN)], 100 * (i // len(SEEN)) + SEEN[i % len(SEEN)]) for i in range(count)]


class Judge:
    """A server, and the unquantized model's pictures and one-step looks in it."""

    def __init__(self, server: Server, size: Size, decoded: bool) -> None:
        self.server, self.size, self.decoded = server, size, decoded
        self.info = server.call("/object_info")

    def graph(self, count: int, steps: int) -> tuple[Drawing, str]:
        """A graph that begins with the capture of `count` prompts; and the node of its calibration."""
        graph = Drawing(self.info)
        capture = graph.capture(rows_per_step=128, seed=steps)  # another number of steps: another capture
        return graph, graph.calibration(
            capture, graph.captured(capture, prompts(count), steps), f"cal_{steps}_{count}"
        )

    def reference(self) -> None:
        graph, size = Drawing(self.info), self.size
        for label in range(size.classes):
            graph.save(graph.draw(graph.original, label, 1000 + label, size.steps, size.batch), f"ref/{label}")
            self._looks(graph, graph.original, label, "ref")
        self.server.run(graph)

    def _looks(self, graph: Drawing, model: str, label: int, name: str) -> None:
        """One step at each probed step, from the latents of the unquantized model."""
        size = self.size
        at, latent = 0, graph.empty(size.batch)
        for start in size.probed:
            if start > at:
                latent, at = graph.part(graph.original, label, 1000 + label, size.steps, latent, at, start, 3.0), start
                if name == "ref":
                    graph.save(latent, f"at/{label}-{start}")
            graph.save(
                graph.part(model, label, 1000 + label, size.steps, latent, start, start + 1, 1.0),
                f"{name}/{label}-{start}",
            )

    def model(self, name: str, fmt: str, method: str, count: int, steps: int) -> float:
        """Quantize in the graph that captured, draw every class, look at single steps. Returns the seconds."""
        graph, calibration = self.graph(count, steps) if "gptq" in method else (Drawing(self.info), "")
        recipe = {**METHODS[method], **({"calibration": (calibration, 0)} if calibration else {})}
        if "in order" in method:
            recipe["model"] = (graph.original, 0)
        source = graph.add("QuantPressLoadSource", file=f"diffusion_models/{MODEL}.safetensors")
        loaded = graph.load(graph.quantized(source, format=fmt, **recipe), self.decoded)
        for label in range(self.size.classes):
            graph.save(graph.draw(loaded, label, 1000 + label, self.size.steps, self.size.batch), f"{name}/{label}")
            self._looks(graph, loaded, label, name)
        started = time.monotonic()
        self.server.run(graph)
        return time.monotonic() - started

    # ---- judging -----------------------------------------------------------------------------------------------
    def pictures(self, name: str, label: int) -> torch.Tensor:
        """SNR per picture, in dB."""
        return snr_each(latents(self.server, f"ref/{label}"), latents(self.server, f"{name}/{label}"))

    def velocity_db(self, name: str) -> float:
        error = power = 0.0
        for label in range(self.size.classes):
            for start in self.size.probed:
                before = self.model_latent(f"at/{label}-{start}", start) if start else self.noise(label)
                reference, found = (
                    self.model_latent(f"{which}/{label}-{start}", start + 1) for which in ("ref", name)
                )
                error += float((reference - found).square().sum())
                power += float((reference - before).square().sum())
        return float(10 * torch.log10(torch.tensor(power / max(error, 1e-30))))

    def model_latent(self, name: str, step: int) -> torch.Tensor:
        """What the sampler held at that step.

        It divides by 1 - sigma when it stops early, and undoes the latent's scale.
        """
        return (latents(self.server, name) - SHIFT) * SCALE * (1 - simple_sigmas(self.size.steps)[step])

    def noise(self, label: int) -> torch.Tensor:
        shape = latents(self.server, f"ref/{label}").shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + label), dtype=torch.float32).double()

    def row(self, row: Row, name: str, nearest: str | None, **about: Any) -> None:
        """One row: SNR of the model, and its gain over the model `nearest`."""
        each = [self.pictures(name, label) for label in range(self.size.classes)]
        values: dict[str, Any] = {
            "velocity_db": self.velocity_db(name),
            "latent_db": float(torch.cat(each).mean()),
            "latent_db_std": float(torch.cat(each).std()),
            "pictures": torch.cat(each).numel(),
        }
        if nearest:
            gains = [mine - self.pictures(nearest, label) for label, mine in enumerate(each)]
            every, unseen = torch.cat(gains), [gain for label, gain in enumerate(gains) if label not in SEEN]
            values |= {
                "velocity_gain_db": values["velocity_db"] - self.velocity_db(nearest),
                "latent_gain_db": float(every.mean()),
                "latent_gain_std": float(every.std()),
                "worse_than_nearest": float((every < 0).double().mean()),
                "latent_gain_unseen_db": float(torch.cat(unseen).mean()) if unseen else None,
                "latent_gain_by_class_std": statistics.pstdev(float(gain.mean()) for gain in gains),
            }
        row(**about, **values)


def prove(
    folder: Path,
    row: Row,
    precision: str,
    formats: Sequence[str],
    servers: int,
    size: Size,
    chosen: Sequence[str] = (),
) -> list[BaseException]:
    """The proof's rows; the formats are shared out among the servers.

    chosen: methods, the format's own where none are.
    precision: bf16, as users run it; or fp32, in float32 with decoded weights, so that only the weights differ.
    """
    shards = {f"proof-{precision}-{i}": tuple(formats[i::servers]) for i in range(min(servers, len(formats)))}

    def shard(name: str, mine: Sequence[str]) -> None:
        with server_of(folder / name, precision) as server:
            judge = Judge(server, size, decoded=precision == "fp32")
            judge.reference()
            jobs = {
                f"{fmt}, {method}": partial(measured, judge, row, fmt, method, size.prompts, size.steps, precision)
                for fmt in mine
                for method in chosen or methods(fmt)
            }
            errors.extend(one_by_one(jobs, row))

    errors: list[BaseException] = []
    return errors + in_parallel({name: partial(shard, name, mine) for name, mine in shards.items()}, row)


def methods(fmt: str) -> tuple[str, ...]:
    extra = {"float8_e4m3fn": ("gptq + input scales",), "nvfp4": ("gptq, no bias",), "bnb_nf4": ("gptq, no bias",)}
    return ("nearest", "search", "gptq", "gptq in order", *extra.get(fmt, ()))


def server_of(base: Path, precision: str) -> Server:
    arguments = ("--force-fp32", "--disable-dynamic-vram") if precision == "fp32" else ()
    return Server(
        make_base(base, {MODEL: Path(__file__).resolve().parents[2] / "assets/tiny_mmdit_256.safetensors"}), *arguments
    )


def measured(
    judge: Judge, row: Row, fmt: str, method: str, count: int, steps: int, precision: str, part: str = "proof"
) -> None:
    name = f"{fmt}-{method}-{count}-{steps}".replace(" ", "_").replace(",", "").replace("+", "and")
    seconds = judge.model(name, fmt, method, count, steps)
    nearest = f"{fmt}-nearest-{count}-{steps}" if part == "proof" else f"{fmt}-nearest-0-0"
    judge.row(
        row,
        name,
        None if method == "nearest" else nearest,
        part=part,
        precision=precision,
        format=fmt,
        method=method,
        prompts=count if "gptq" in method else 0,
        capture_steps=steps if "gptq" in method else 0,
        seconds=seconds,
    )


def curve(
    folder: Path, row: Row, formats: Sequence[str], size: Size, counts: Sequence[int], steps: Sequence[int]
) -> list[BaseException]:
    """gptq's gain by the number of prompts, and with size.prompts prompts by that of steps.

    Computed in float32 with decoded weights.
    """
    errors: list[BaseException] = []

    def shard(fmt: str) -> None:
        with server_of(folder / f"curve-{fmt}", "fp32") as server:
            judge = Judge(server, size, decoded=True)
            judge.reference()
            jobs = {f"curve {fmt} nearest": partial(measured, judge, row, fmt, "nearest", 0, 0, "fp32", "curve")}
            for count, of in [*((count, size.steps) for count in counts), *((size.prompts, of) for of in steps)]:
                jobs[f"curve {fmt} {count} x {of}"] = partial(
                    measured, judge, row, fmt, "gptq", count, of, "fp32", "curve"
                )
            errors.extend(one_by_one(jobs, row))

    return errors + in_parallel({fmt: partial(shard, fmt) for fmt in formats}, row)


def floor(folder: Path, row: Row, size: Size) -> list[BaseException]:
    """What computing in bf16 alone changes: the unquantized model in bf16 against itself in float32, same noise."""

    def job() -> None:
        judges = {}
        for precision in ("fp32", "bf16"):
            with server_of(folder / f"floor-{precision}", precision) as server:
                judges[precision] = Judge(server, size, decoded=False)
                judges[precision].reference()
        one, other = judges["fp32"], judges["bf16"]
        each = torch.cat(
            [
                snr_each(latents(one.server, f"ref/{label}"), latents(other.server, f"ref/{label}"))
                for label in range(size.classes)
            ]
        )
        error = power = 0.0
        for label in range(size.classes):
            reference, found = (judge.model_latent(f"ref/{label}-0", 1) for judge in (one, other))
            error += float((reference - found).square().sum())
            power += float((reference - one.noise(label)).square().sum())
        row(
            part="floor",
            latent_db=float(each.mean()),
            latent_db_std=float(each.std()),
            first_step_velocity_db=float(10 * torch.log10(torch.tensor(power / max(error, 1e-30)))),
        )

    return one_by_one({"floor": job}, row)
