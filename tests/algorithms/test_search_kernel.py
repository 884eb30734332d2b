"""The search's fused sums against their specification in torch; by the interpreter on a CPU, compiled on a GPU."""

from dataclasses import replace

import pytest
import torch
from comfyui_quantpress.quant_core.algorithms.choosers import search
from comfyui_quantpress.quant_core.algorithms.task import ScaleTask
from comfyui_quantpress.quant_core.formats import all_formats, get_format

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [
    replace(f, rotation=16 if f.rotation else None) for f in all_formats() if f.levels(torch.device("cpu")) is not None
]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)


def make_task(fmt, shape, weighted):
    generator = torch.Generator().manual_seed(3)
    work = fmt.prepare(torch.randn(shape, generator=generator) * 0.1).to(DEVICE)
    weights = torch.rand(work.shape[1], generator=generator).to(DEVICE) if weighted else None
    return ScaleTask(fmt, work, weights)


@pytest.fixture
def kernel(monkeypatch):
    """Both ways on one device: turns the kernel on and off."""
    return lambda on: monkeypatch.setattr(search, "runs_triton", lambda device: on)


@formats
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_and_least_squares_are_those_of_torch(fmt, weighted, kernel):
    task = make_task(fmt, (128, 256), weighted)
    base = task.fmt.absmax(task.work)
    smaller = task.fmt.qparams(base.effective() * 0.5, like=base)
    got = {}
    for on in (False, True):
        kernel(on)
        got[on] = [
            search.block_loss(task, base),
            search.block_loss(task, smaller),
            search.least_squares(task, base).effective(),
        ]
    for torchs, ours in zip(got[False], got[True], strict=True):
        assert ours.shape == torchs.shape and torch.allclose(ours, torchs, rtol=2e-4, atol=1e-12)
    assert not torch.equal(got[True][0], got[True][1])


@pytest.mark.parametrize("shape", [(1, 16), (3, 80), (5, 272)])
def test_ragged_shapes(shape, kernel):
    for name in ("nvfp4", "float8_e4m3fn_rowwise", "float8_e4m3fn"):
        task = make_task(get_format(name).for_shape(shape), shape, True)
        qp = task.fmt.absmax(task.work)
        kernel(False)
        wanted = search.block_loss(task, qp)
        kernel(True)
        assert torch.allclose(search.block_loss(task, qp), wanted, rtol=2e-4, atol=1e-12)


def test_a_block_of_zeros_costs_nothing(kernel):
    task = make_task(get_format("nvfp4"), (2, 32), False)
    task.work[0, :16] = 0
    kernel(True)
    loss = search.block_loss(task, task.fmt.absmax(task.work))
    assert float(loss[0, 0]) == 0.0 and float(loss[0, 1]) > 0.0
