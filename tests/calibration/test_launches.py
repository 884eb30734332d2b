"""What a capture costs a GPU, counted without one: the meta device sees every kernel, and whatever waits fails."""

from collections import Counter

import pytest
import torch
from comfyui_quantpress.quant_core.calibration.capture.budget import Budget, plan_budget
from comfyui_quantpress.quant_core.calibration.capture.collector import CallContext, CaptureSettings, Collector
from comfyui_quantpress.quant_core.calibration.capture.linear_modules import linear_modules
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS, WIDTH, TOKENS, STEPS = 4, 32, 2048, 64
NO_KERNEL = {
    "view",
    "_unsafe_view",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "t",
    "transpose",
    "detach",
    "expand",
    "empty",
    "unsqueeze",
    "empty_strided",
    "as_strided",
    "alias",
    "reshape",
    "permute",
}


class Kernels(TorchDispatchMode):
    """Counts what runs on the meta device, by name."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(result, torch.Tensor) and result.is_meta and name not in NO_KERNEL:
            self.found[name] += 1
        return result


def kernels_per_layer_call(hessians, **settings):
    """Beyond those of the model itself, over steps in which the staged rows were worked in several times."""
    net = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]).to("meta", torch.bfloat16)
    layers = linear_modules(net)
    watch = Collector(
        layers, plan_budget({name: WIDTH for name in layers}, Budget(hessians=hessians)), CaptureSettings(**settings)
    )
    x, step = torch.empty(2, TOKENS, WIDTH, dtype=torch.bfloat16, device="meta"), iter(range(10**6))
    with torch.inference_mode():
        with Kernels() as plain:
            net(x)
        with watch.capture(net, lambda: CallContext(next(step), 1.0, ("cond", "uncond"))):
            net(x)  # makes the accumulators
            with Kernels() as watched:
                for _ in range(STEPS):
                    net(x)
    return (watched.found.total() - STEPS * plain.found.total()) / STEPS / LAYERS, watched.found


@pytest.mark.parametrize(("hessians", "most"), [(False, 5.5), (True, 9.5)])
def test_a_watched_call_costs_a_handful_of_kernels_and_waits_for_none(hessians, most):
    found, names = kernels_per_layer_call(hessians)
    assert 2 < found < most, names


def test_fewer_rows_per_step_mean_fewer_kernels():
    assert kernels_per_layer_call(True, rows_per_step=16)[0] < kernels_per_layer_call(True, rows_per_step=256)[0] / 2
