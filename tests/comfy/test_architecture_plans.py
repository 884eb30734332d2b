"""Every model that the table knows, in its real shapes and without weights: its plan in every kind of packing.

ComfyUI's detection must take the planned file for the same model as the source, and whatever is quantized must be a
linear layer by ComfyUI's own class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_server import missing
from comfyui_quantpress.quant_core.checkpoint.source import open_source
from comfyui_quantpress.quant_core.errors import PlanError
from comfyui_quantpress.quant_core.formats import all_formats
from comfyui_quantpress.quant_core.formats.base import Format
from comfyui_quantpress.quant_core.pipeline.plan import Plan, make_plan
from comfyui_quantpress.quant_core.pipeline.request import Request
from comfyui_quantpress.quant_core.policy.architectures import architectures
from comfyui_quantpress.quant_core.policy.general import Policy
from comfyui_quantpress.quant_core.policy.recipe import parse_recipe
from known_models import zeros
from tiny_models import Worker

HERE = Path(__file__).parent
CONFIGS = json.loads((HERE / "architecture_configs.json").read_text("utf-8"))
# "t5" stands for other sizes than those that the table names.
ENCODERS = [name for name in json.loads((HERE / "text_encoder_configs.json").read_text("utf-8")) if name != "t5"]
RUN = {known.id: known.runs_quantized for known in architectures()}
VARIANTS = [(name, variant) for name, entry in CONFIGS.items() for variant in entry["variants"]]
EVERYTHING = Policy(only=(".",))  # also what the general rules would keep
SHAPES = ((256, 256), (272, 1024), (96, 320), (100, 64), (640, 1152))


def packings() -> list[Format]:
    """The first format of those that store weights of every shape in the same shape, or cannot take it."""
    found: dict[tuple[tuple[int, ...] | None, ...], Format] = {}
    for fmt in all_formats():
        stored = tuple(
            None if fmt.problem(shape) else fmt.for_shape(shape).tensor_specs(shape)[0].shape for shape in SHAPES
        )
        found.setdefault(stored, fmt)
    return list(found.values())


PACKINGS = packings()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    if missing():
        pytest.skip(missing())
    running = Worker(tmp_path_factory.mktemp("plans"), "plans_script.py", "-")
    yield running
    running.end()


def plan_of(path: Path, fmt: Format, policy: Policy) -> Plan:
    with open_source(path) as src:
        return make_plan(src, Request(path, path.with_name("out.safetensors"), parse_recipe(fmt), policy))


def check(worker: Worker, model: dict[str, Any], encoder: bool, folder: Path) -> None:
    """Even when all layers are asked for.

    model: {"shapes": {tensor: shape}, "linear": [layer]}, from ComfyUI's class.
    """
    path = zeros(folder / "model.safetensors", model["shapes"])
    source = {name: ["BF16", shape] for name, shape in model["shapes"].items()}
    before = worker.ask("detect", encoder=encoder, tensors=source)
    assert before not in ("None", ["NoneType", {}])
    for fmt in PACKINGS:
        if all(fmt.problem(model["shapes"][f"{layer}.weight"]) for layer in model["linear"]):
            with pytest.raises(PlanError, match="none of the"):
                plan_of(path, fmt, EVERYTHING)
            continue
        plan = plan_of(path, fmt, EVERYTHING)
        assert plan.quantized, fmt.name
        assert {layer.layer for layer in plan.quantized} <= set(model["linear"]), fmt.name
        planned = {output.name: [output.dtype, list(output.shape)] for output in plan.outputs}
        assert worker.ask("detect", encoder=encoder, tensors=planned) == before, fmt.name
    usual = plan_of(path, all_formats()[0], Policy())
    assert {layer.layer for layer in usual.quantized} <= set(model["linear"])


def model_of(worker: Worker, task: str, **which: str) -> dict[str, Any]:
    model = worker.ask(task, **which)
    if model is None:
        pytest.skip("the present ComfyUI does not have this model")
    return model


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=[variant for _, variant in VARIANTS])
def test_a_planned_diffusion_model_is_detected_as_before_and_only_its_linear_layers_change(
    name, variant, worker, tmp_path
):
    check(worker, model_of(worker, "diffusion_model", name=name, variant=variant), False, tmp_path)


@pytest.mark.parametrize("name", [name for name in ENCODERS if RUN[name]])
def test_a_planned_text_encoder_is_detected_as_before_and_only_its_linear_layers_change(name, worker, tmp_path):
    check(worker, model_of(worker, "text_encoder", name=name), True, tmp_path)


@pytest.mark.parametrize("name", [name for name in ENCODERS if not RUN[name]])
def test_a_text_encoder_that_comfyui_does_not_run_quantized_is_refused_in_every_format(name, worker, tmp_path):
    path = zeros(tmp_path / "model.safetensors", model_of(worker, "text_encoder", name=name)["shapes"])
    for fmt in all_formats():
        with pytest.raises(PlanError, match="ComfyUI does not run that quantized"):
            plan_of(path, fmt, Policy())
