"""Where the layers of bench/rounding/synthetic.py come from: drawn at random, or taken from trained models at work.

Synthetic layers: Student-t weights (5 degrees of freedom) with outlier rows and columns; inputs are a mixture of K / 8
Student-t factors plus noise, with 8 strong channels; the share of noise decides how much any error feedback can gain.
Trained models: every Linear that runs, with the inputs it sees. Calibration and judging never share a text or a seed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import minilm as encoder
import torch
from comfyui_quantpress.demo.sampler import load_conditioning, simple_sigmas, starting_noise
from comfyui_quantpress.demo.tiny_mmdit import TinyMMDiT
from comfyui_quantpress.quant_core.algorithms.evidence import Evidence
from safetensors.torch import load_file
from torch import Tensor, nn

ASSETS = Path(__file__).resolve().parents[2] / "assets"
NOISE = (
    0.15  # with it plain GPTQ gains what it does on the inputs of the project's reference measurements, about 0.3 x
)
JUDGED_ROWS, BIAS_ROWS, ROWS_PER_CALL = 1024, 256, 64
_PASSAGES = {"calibrate": (False, 192), "tune": (True, 32), "judge": (True, 64)}  # odd topics?, how many


@dataclass(frozen=True, slots=True)
class Layer:
    """weight [N, K]; bias [N] or None; evidence of the calibration rows; held_out: float32 [R, K]."""

    name: str
    weight: Tensor
    evidence: Evidence
    held_out: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """run: works through the inputs for "calibrate", "tune" (rows held out for bias correction) or "judge"."""

    name: str
    model: nn.Module
    run: Callable[[str], None]


def synthetic(n: int, k: int, rows: int, device: str, seed: int = 0) -> Layer:
    """A layer of the setting above; the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=generator, device=device)  # noqa: E731
    some = lambda count, of: torch.randperm(of, generator=generator, device=device)[: max(1, count)]  # noqa: E731

    def student(*size: int) -> Tensor:
        return normal(*size) / (sum(normal(*size).square_() for _ in range(5)) / 5).sqrt_()

    weight = student(n, k) * 0.02
    weight[some(n // 256, n)] *= 3
    weight[:, some(k // 256, k)] *= 3
    mixing = normal(max(8, k // 8), k) / max(8, k // 8) ** 0.5
    strong = torch.ones(k, device=device)
    strong[some(8, k)] = 20
    draw = lambda count: (student(count, mixing.shape[0]) @ mixing + NOISE * student(count, k)) * strong  # noqa: E731
    hessian = torch.zeros(k, k, device=device)
    for _ in range(0, rows, 2048):
        part = draw(2048)
        hessian.addmm_(part.T, part, alpha=1 / rows)
    return Layer(f"synthetic {n}x{k}", weight, Evidence(hessian=hessian, count=rows), draw(2048))


def errors_of(layer: Layer, decoded: Tensor, moved: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(norm of the held-out rows' output, norm of its error); moved: what the bias gained, [N]."""
    error = layer.held_out @ (decoded - layer.weight).T
    return (layer.held_out @ layer.weight.T).norm(), (error if moved is None else error + moved).norm()


def _by_seed(sample: Callable[[int], Any]) -> Callable[[str], None]:
    """Calibrates on seeds 1 and 2, tunes on 3, judges on 77."""
    seeds = {"calibrate": (1, 2), "tune": (3,), "judge": (77,)}

    def run(purpose: str) -> None:
        for seed in seeds[purpose]:
            sample(seed)

    return run


def demo_model(device: str) -> Trained:
    """The demo's model; one run samples all classes from a seed."""
    weights = {name: tensor.float() for name, tensor in load_file(ASSETS / "tiny_mmdit_256.safetensors").items()}
    model = TinyMMDiT(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("joint_blocks.")))
    model.load_state_dict(weights)
    model.eval().to(device)
    table = load_conditioning(ASSETS / "conditioning.safetensors")
    pooled, context = table.pooled.float().to(device), table.context.float().to(device)

    @torch.inference_mode()
    def sample(seed: int) -> None:
        labels = torch.arange(table.null_row, device=device)
        x, null = starting_noise(seed, labels.tolist()).to(device), torch.full_like(labels, table.null_row)
        sigmas = simple_sigmas(20)
        for now, after in pairwise(sigmas):
            t = torch.full((len(labels),), now * 1000, device=device)
            with torch.device(device):  # the model's constants
                wanted, plain = model(x, t, context[labels], pooled[labels]), model(x, t, context[null], pooled[null])
            x = x + (after - now) * (plain + 3.0 * (wanted - plain))

    return Trained("demo", model, _by_seed(sample))


def other_model(folder: Path, name: str, device: str) -> Trained:
    """The same for `<folder>/<name>.safetensors` with the code in `<folder>/tiny_models.py`."""
    spec = importlib.util.spec_from_file_location("tiny_models", folder / "tiny_models.py")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    model = code.load_mmdit(str(folder / f"{name}.safetensors")).to(device)
    decoder = code.load_autoencoder(str(folder / "tiny_taesd.safetensors")).to(device)
    table = load_file(folder / "conditioning.safetensors")
    return Trained(
        name,
        model,
        _by_seed(
            lambda seed: code.sample(
                model, decoder, (table["pooled"], table["context"]), device, per_class=1, seed=seed, cfg=3
            )
        ),
    )


def minilm(folder: Path, device: str) -> Trained:
    """all-MiniLM-L6-v2 from anywhere below `folder`; reads other topics for judging than for calibration."""
    found = sorted(folder.rglob("model.safetensors"))
    if not found:
        raise SystemExit(f"{folder}: no model.safetensors below it. {encoder.__doc__}")
    home = found[0].parent
    model = encoder.load_encoder(home).to(device)

    def run(purpose: str) -> None:
        odd, count = _PASSAGES[purpose]
        # Of the odd topics the first passages tune, the last judge.
        tokens = encoder.passages(home, odd)
        tokens = tokens[: len(tokens) // 2] if purpose == "tune" else tokens[len(tokens) // 2 * odd :]
        encoder.read(model, tokens[torch.linspace(0, len(tokens) - 1, count).long()])

    return Trained("minilm", model, run)


@dataclass(slots=True)
class Seen:
    """total: sum of x^T x. mean: sum of x. parts: random rows of each call. count: rows seen."""

    total: Tensor
    mean: Tensor
    parts: list[Tensor] = field(default_factory=list)
    count: int = 0


def observed(model: nn.Module, run: Callable[[], None]) -> dict[str, Seen]:
    """{Linear: what went into it} during `run`."""
    seen: dict[str, Seen] = {}
    generator = torch.Generator().manual_seed(0)

    def watch(name: str, module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().reshape(-1, module.in_features).float()
        now = seen.setdefault(name, Seen(x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1])))
        now.total.addmm_(x.T, x)
        now.mean += x.sum(dim=0)
        now.parts.append(x[torch.randperm(len(x), generator=generator)[:ROWS_PER_CALL].to(x.device)])
        now.count += len(x)

    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: watch(name, m, args))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def layers_of(trained: Trained, stride: int = 1) -> Iterator[Layer]:
    """Every `stride`-th Linear that runs."""
    looks = {purpose: observed(trained.model, lambda purpose=purpose: trained.run(purpose)) for purpose in _PASSAGES}
    generator = torch.Generator().manual_seed(0)

    def rows(name: str, purpose: str, count: int) -> Tensor:
        found = torch.cat(looks[purpose][name].parts)
        return found[torch.randperm(len(found), generator=generator)[:count].to(found.device)]

    for index, (name, seen) in enumerate(looks["calibrate"].items()):
        if index % stride == 0:
            module = trained.model.get_submodule(name)
            evidence = Evidence(
                hessian=seen.total / seen.count,
                mean=seen.mean / seen.count,
                count=seen.count,
                rows=rows(name, "tune", BIAS_ROWS),
            )
            yield Layer(
                f"{trained.name}.{name}",
                module.weight.detach(),
                evidence,
                rows(name, "judge", JUDGED_ROWS),
                None if module.bias is None else module.bias.detach(),
            )
