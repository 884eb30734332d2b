"""The same workflows in every memory mode of ComfyUI at once, and on the CPU.

Some results must be equal; of the rest the rows say how close they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comfy_server import WorkflowError
from rig import (
    MODEL,
    ROOT,
    Drawing,
    Row,
    Server,
    calibration_tensors,
    in_parallel,
    latents,
    make_base,
    one_by_one,
    snr_db,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MODES: dict[str, tuple[str, ...]] = {
    "default": (),
    "no dynamic vram": ("--disable-dynamic-vram",),
    "lowvram": ("--disable-dynamic-vram", "--lowvram"),
    "novram": ("--novram",),
    "highvram": ("--highvram",),
    "async offload off": ("--disable-async-offload",),
    "reserve": ("--disable-dynamic-vram", "--reserve-vram", "500"),  # GB: no room for any weight
    "headroom": ("--vram-headroom", "500"),
    "cpu": ("--cpu",),
}  # the same, with dynamic VRAM
FORMATS = (
    "nvfp4",
    "int8_convrot",
    "float8_e4m3fn",
    "float8_e4m3fn_rowwise",
    "float8_e4m3fn_blockwise",
    "int8_blockwise",
    "int8_rowwise",
    "bnb_nf4",
    "convrot_w4a4",
    "mxfp8",
    "asym_w4a8_int8",
    "awq_w4a16",
)
PROMPTS, STEPS = ((0, 0), (3, 3), (5, 5), (8, 8)), 20


class Flow:
    """One mode's server, and what is done in it."""

    def __init__(self, mode: str, server: Server, row: Row, small: bool, wanted: str) -> None:
        self.mode, self.server, self.small, self.wanted = mode, server, small, wanted
        self.row = partial(row, mode=mode)
        self.info = server.call("/object_info")
        self.steps = 2 if small else STEPS
        self.stuck = False

    def drawing(self) -> Drawing:
        return Drawing(self.info)

    def run(self, graph: Drawing) -> dict[str, Any]:
        """Its outputs. A server that died or hangs is asked no more."""
        if self.stuck:
            raise RuntimeError("skipped: the server gave no answer before")
        self.stuck = True
        try:
            outputs = self.server.run(graph)
        except WorkflowError:
            self.stuck = False
            raise
        self.stuck = False
        return outputs

    def source(self, graph: Drawing) -> str:
        return graph.add("QuantPressLoadSource", file=f"diffusion_models/{MODEL}.safetensors")

    def original(self) -> None:
        graph = self.drawing()
        graph.save(graph.draw(graph.original, 2, 2, 4), "original")
        self.run(graph)

    def format(self, fmt: str) -> None:
        """Sampled in the graph, saved, loaded by the stock node, sampled again."""
        graph = self.drawing()
        quantized = graph.quantized(self.source(graph), format=fmt)
        graph.save(graph.draw(graph.load(quantized), 2, 2, 4), f"graph-{fmt}")
        saved = graph.add(
            "QuantPressSave", quantized=(quantized, 0), folder="diffusion_models", name=f"q-{fmt}", overwrite=True
        )
        graph.save(graph.draw(graph.unet((saved, 0)), 2, 2, 4), f"file-{fmt}")
        self.run(graph)
        one, other = latents(self.server, f"graph-{fmt}"), latents(self.server, f"file-{fmt}")
        self.row(
            what="format",
            format=fmt,
            reloaded_equal=bool(torch.equal(one, other)),
            snr_to_original_db=snr_db(latents(self.server, "original"), one),
        )

    def capture(self) -> None:
        """Two prompts that accumulate; what is drawn without the capture is not seen; the pictures stay the same."""
        for count in (2, len(PROMPTS)):
            graph = self.drawing()
            node = graph.capture()
            latent = graph.captured(node, PROMPTS[:count], self.steps)
            graph.calibration(node, latent, f"part{count}")
            self.run(graph)
        graph = self.drawing()
        node = graph.capture()
        graph.calibration(node, graph.draw(graph.original, 1, 77, 2), "after")  # of the same module, unwatched
        for name, model in (("watched", node), ("plain", graph.original)):
            graph.save(graph.draw(model, 6, 50, 3), name)
        graph.nodes.pop(
            next(name for name, made in graph.nodes.items() if made["inputs"].get("filename_prefix") == "watched")
        )
        self.run(graph)
        parts = [self._layers(name) for name in ("part2", f"part{len(PROMPTS)}", "after")]
        seen = [sum(layer["seen"] for layer in part.values()) for part in parts]
        self.row(
            what="capture",
            layers=len(parts[1]),
            rows_seen=seen,
            accumulated=seen[1] == 2 * seen[0],
            hooks_gone=seen[2] == seen[1],
        )
        graph = self.drawing()
        graph.save(graph.draw(graph.capture(rows_per_step=17), 6, 50, 3), "watched")
        self.run(graph)
        self.row(
            what="watched picture",
            equal=bool(torch.equal(latents(self.server, "watched"), latents(self.server, "plain"))),
        )

    def _layers(self, name: str) -> dict[str, Any]:
        with safe_open(self.server.base / f"models/calibrations/{name}.safetensors", "pt") as file:
            return json.loads(file.metadata()["quantpress_calibration"])["layers"]

    def calibrated(self, fmt: str) -> None:
        """Capture, collect, quantize with gptq and sample, all in one graph."""
        graph = self.drawing()
        node = graph.capture()
        calibration = graph.calibration(node, graph.captured(node, PROMPTS, self.steps), f"part{len(PROMPTS)}")
        graph.save(graph.draw(graph.original, 0, 101, self.steps, 4), "held-out")
        for name, recipe in (
            ("nearest", {}),
            ("gptq", {"scales": "auto", "rounding": "auto", "calibration": (calibration, 0)}),
        ):
            quantized = graph.quantized(self.source(graph), format=fmt, **recipe)
            graph.save(graph.draw(graph.load(quantized), 0, 101, self.steps, 4), f"{name}-{fmt}")
        outputs = self.run(graph)
        reference = latents(self.server, "held-out")
        warned = [line for line in outputs[quantized]["text"][0].splitlines() if "warning" in line.lower()]
        self.row(
            what="gptq",
            format=fmt,
            warnings=warned,
            **{f"{name}_db": snr_db(reference, latents(self.server, f"{name}-{fmt}")) for name in ("nearest", "gptq")},
        )

    def ordered(self) -> None:
        """Quantized in order beside the model itself, from a capture of its own; modes are compared by the file."""
        graph = self.drawing()
        node = graph.capture(rows_per_step=64)
        calibration = graph.calibration(node, graph.captured(node, PROMPTS, self.steps), "ordered")
        quantized = graph.quantized(
            self.source(graph),
            format="nvfp4",
            scales="auto",
            rounding="auto",
            calibration=(calibration, 0),
            model=(graph.original, 0),
        )
        graph.add(
            "QuantPressSave", quantized=(quantized, 0), folder="diffusion_models", name="q-ordered", overwrite=True
        )
        for name, model in (("ordered-held-out", graph.original), ("ordered", graph.load(quantized))):
            graph.save(graph.draw(model, 0, 101, self.steps, 4), name)
        said = self.run(graph)[quantized]["text"][0].splitlines()
        self.row(
            what="in order",
            said=[line for line in said if "in order" in line or "warning" in line],
            snr_db=snr_db(latents(self.server, "ordered-held-out"), latents(self.server, "ordered")),
        )

    def compiled(self) -> None:
        graph = self.drawing()
        patched = graph.add("TorchCompileModel", model=(graph.original, 0), backend="inductor")
        node = graph.add("QuantPressCapture", model=(patched, 0))
        graph.calibration(node, graph.draw(node, 1, 1, 1), "compiled")
        said = "nothing: it was not refused"
        try:
            self.run(graph)
        except WorkflowError as error:
            said = f"{error.node}: {error.message}"
        self.row(what="compiled", refused="compiled" in said, said=said[:160])

    def lora(self, fmt: str | None) -> None:
        """What a LoRA moves on the quantized model, beside what it moves on the original."""
        for strength in (0.0, 1.0):
            graph = self.drawing()
            model = graph.original if fmt is None else graph.load(graph.quantized(self.source(graph), format=fmt))
            patched = graph.add(
                "LoraLoaderModelOnly", model=(model, 0), lora_name="bench.safetensors", strength_model=strength
            )
            graph.save(graph.draw(patched, 2, 2, 1), f"lora-{fmt}-{strength}")
            self.run(graph)
        if fmt is None:
            return
        one, other = (
            latents(self.server, f"lora-{of}-1.0") - latents(self.server, f"lora-{of}-0.0") for of in (fmt, None)
        )
        self.row(
            what="lora",
            format=fmt,
            cosine=float((one * other).sum() / (one.norm() * other.norm())),
            size=float(one.norm() / other.norm()),
        )

    def all(self) -> list[BaseException]:
        formats = FORMATS[:2] if self.small else FORMATS
        write_lora(self.server.base)
        jobs = {
            "original": self.original,
            **{fmt: partial(self.format, fmt) for fmt in formats},
            "capture": self.capture,
            **{f"gptq {fmt}": partial(self.calibrated, fmt) for fmt in ("nvfp4", "int8_blockwise")},
            "in order": self.ordered,
            "compiled": self.compiled,
            "lora": partial(self.lora, None),
            **{f"lora {fmt}": partial(self.lora, fmt) for fmt in formats[:10]},
        }
        return one_by_one(
            {f"{self.mode}: {name}": job for name, job in jobs.items() if re.search(self.wanted, name)}, self.row
        )


def write_lora(base: Path) -> None:
    """Rank 4, on the trained model's attention and MLPs."""
    state, generator, lora = (
        load_file(ROOT / "assets/tiny_mmdit_256.safetensors"),
        torch.Generator().manual_seed(5),
        {},
    )
    for name, w in state.items():
        if name.startswith("joint_blocks.") and name.endswith(("qkv.weight", "fc1.weight", "fc2.weight")):
            layer, (n, k) = "diffusion_model." + name.removesuffix(".weight"), w.shape
            lora[layer + ".lora_down.weight"] = torch.randn(4, k, generator=generator) / k**0.5
            lora[layer + ".lora_up.weight"] = torch.randn(n, 4, generator=generator) * float(w.float().std()) * 6
    save_file(lora, base / "models/loras/bench.safetensors")


def compare(folder: Path, row: Row, modes: Sequence[str], small: bool, wanted: str = "") -> list[BaseException]:
    """wanted: a regular expression, only jobs whose name it is found in are done."""
    flows: dict[str, Flow] = {}
    errors: list[BaseException] = []

    def one(mode: str) -> None:
        base = make_base(
            folder / f"mode-{mode.replace(' ', '-')}", {MODEL: ROOT / "assets/tiny_mmdit_256.safetensors"}
        )
        with Server(base, *MODES[mode]) as server:
            flows[mode] = Flow(mode, server, row, small, wanted)
            errors.extend(flows[mode].all())
            lines = server.log_text().splitlines()
            row(
                what="log",
                mode=mode,
                said=[line[-90:] for line in lines if "DynamicVRAM" in line or "Set vram state" in line],
                warnings=[line[-200:] for line in lines if "QuantPress" in line and "WARN" in line][:5],
            )

    errors += in_parallel({mode: partial(one, mode) for mode in modes}, row)
    first = next((mode for mode in modes if mode in flows), "")
    between = {
        f"{mode} against {first}": partial(_beside, row, flows[mode], flows[first], small)
        for mode in modes
        if mode in flows and mode != first
    }
    return errors + one_by_one(between, row)


def _beside(row: Row, flow: Flow, first: Flow, small: bool) -> None:
    """Two modes: latents, saved files, calibrations."""
    names = ["original", *(f"graph-{fmt}" for fmt in (FORMATS[:2] if small else FORMATS))]
    for name in names:
        if list((flow.server.base / "output").glob(f"{name}_*")) and list(
            (first.server.base / "output").glob(f"{name}_*")
        ):
            one, other = latents(first.server, name), latents(flow.server, name)
            files = [
                _digest(of.server.base / f"models/diffusion_models/q-{name.removeprefix('graph-')}.safetensors")
                for of in (flow, first)
            ]
            row(
                what="beside",
                mode=flow.mode,
                of=first.mode,
                latent=name,
                equal=bool(torch.equal(one, other)),
                snr_db=min(snr_db(one, other), 999.0),
                same_file=None if name == "original" else files[0] == files[1],
            )
    ordered = [of.server.base / "models/diffusion_models/q-ordered.safetensors" for of in (flow, first)]
    if all(path.is_file() for path in ordered):
        row(
            what="beside",
            mode=flow.mode,
            of=first.mode,
            latent="ordered",
            same_file=_same_tensors(*ordered),
            equal=bool(torch.equal(latents(first.server, "ordered"), latents(flow.server, "ordered"))),
            snr_db=min(snr_db(latents(first.server, "ordered"), latents(flow.server, "ordered")), 999.0),
        )
    if not all(
        (of.server.base / f"models/calibrations/part{len(PROMPTS)}.safetensors").is_file() for of in (flow, first)
    ):
        return
    mine, theirs = (calibration_tensors(of.server, f"part{len(PROMPTS)}") for of in (flow, first))
    kinds: dict[str, float] = {}
    for name in sorted(mine.keys() & theirs.keys()):
        one, other, kind = mine[name].double(), theirs[name].double(), name.rpartition(".")[2]
        if one.shape == other.shape:
            kinds[kind] = max(kinds.get(kind, 0.0), float((one - other).norm() / other.norm().clamp(min=1e-30)))
    layers = [
        {name: (layer["seen"], layer.get("sampled")) for name, layer in of._layers(f"part{len(PROMPTS)}").items()}
        for of in (flow, first)
    ]
    row(
        what="calibrations",
        mode=flow.mode,
        of=first.mode,
        same_keys=mine.keys() == theirs.keys(),
        same_rows=layers[0] == layers[1],
        equal=all(torch.equal(mine[name], theirs[name]) for name in mine.keys() & theirs.keys()),
        largest_difference=kinds,
    )


def _same_tensors(one: Path, other: Path) -> bool:
    """The headers name calibrations, whose files have names of their own."""
    mine, theirs = load_file(one), load_file(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
