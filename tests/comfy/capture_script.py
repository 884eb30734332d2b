"""Run by ComfyUI's Python: checks of the capture on ComfyUI's own samplers, one function each, run by test_capture.py.

    capture_script.py COMFYUI_DIR PACK_DIR FUNCTION MODEL_FILE
A failed check is an AssertionError and a non-zero exit status.
"""

import asyncio
import sys
from contextlib import contextmanager

comfyui, pack_dir, function, file = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu", "--disable-all-custom-nodes"]

import comfy.options  # noqa: E402
import torch  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402

import nodes  # noqa: E402

assert asyncio.run(nodes.load_custom_node(pack_dir))


def pack(name):
    return sys.modules[pack_dir.replace(".", "_x_") + "." + name]


def watched(model, calls=64, **settings):
    """(the watched model, its capture), as the node makes them."""
    budget, capturing = (
        pack("quant_core.calibration.capture.budget").Budget,
        pack("quant_core.calibration.capture.collector").CaptureSettings,
    )
    return pack("nodes.jobs.capture_activations").watch(
        model, "", budget(2**28, 2**28), capturing(**settings), calls, True
    )


def sample(model, steps=2):
    conditioning = [
        [torch.randn(1, 8, 128, generator=torch.Generator().manual_seed(1)), {"pooled_output": torch.zeros(1, 128)}]
    ]
    latent = torch.zeros(1, 16, 16, 16)
    return comfy.sample.sample(
        model,
        torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)),
        steps,
        3.0,
        "euler",
        "simple",
        conditioning,
        conditioning,
        latent,
        seed=5,
        disable_pbar=True,
    )


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.model.diffusion_model.modules())


@contextmanager
def memory_asked_for():
    """Yields a list of what load_models_gpu was told to leave free: (most, least)."""
    plain, asked = comfy.model_management.load_models_gpu, []

    def load(models, memory_required=0, *args, minimum_memory_required=None, **kwargs):
        asked.append((memory_required, minimum_memory_required))
        return plain(models, memory_required, *args, minimum_memory_required=minimum_memory_required, **kwargs)

    comfy.model_management.load_models_gpu = load
    try:
        yield asked
    finally:
        comfy.model_management.load_models_gpu = plain


@contextmanager
def refused(said):
    error = pack("quant_core.errors").RequestError
    try:
        yield
    except error as err:
        assert said in str(err), err
    else:
        raise AssertionError(f"nothing was refused: {said}")


def the_loader_leaves_room_for_the_record():
    model = comfy.sd.load_diffusion_model(file)
    observed, capture = watched(model)
    with memory_asked_for() as asked:
        for sampled in (model, observed, observed, model):
            sample(sampled)
    plain, first, second, after = asked
    room = capture.plan.device_bytes
    assert room > 10**7 and first == (plain[0] + room, plain[1] + room), asked
    # What was allocated in the first run is in use by then, and is not asked for again.
    assert plain[0] < second[0] < first[0] and second[0] - plain[0] == capture._collector.missing_device_bytes(), asked
    assert after == plain and "memory_required" not in model.model.__dict__
    kept = sum(
        value.nbytes
        for s in capture._collector.result().statistics.values()
        for value in (s.absmax, s.sum, s.square_sum, s.histogram, s.reservoir.rows, s.hessian.total())
    )
    assert room - capture._collector.missing_device_bytes() == kept


def the_room_is_not_asked_for_once_loading_has_failed():
    model = comfy.sd.load_diffusion_model(file)
    observed, capture = watched(model)
    plain = comfy.model_management.load_models_gpu

    def fail(*args, **kwargs):
        raise MemoryError

    comfy.model_management.load_models_gpu = fail
    try:
        sample(observed)
    except MemoryError:
        pass
    else:
        raise AssertionError("loading did not fail")
    comfy.model_management.load_models_gpu = plain
    assert "memory_required" not in model.model.__dict__ and hooks(model) == 0
    sample(observed)
    assert [run.completed for run in capture._collector.result().runs] == [False, True]


def another_model_in_the_captured_ones_place_is_refused():
    model, other = comfy.sd.load_diffusion_model(file), comfy.sd.load_diffusion_model(file)
    observed, capture = watched(model)
    replaced = observed.clone()
    replaced.add_object_patch("diffusion_model", other.model.diffusion_model)
    carried = other.clone()
    carried.wrappers = observed.clone().wrappers
    for sampled in (replaced, carried):
        with refused("another model is being sampled than the one that it was given"):
            sample(sampled)
    assert hooks(model) == hooks(other) == 0
    with refused("the calibration is empty"):
        capture.collect(pack("nodes.shared.progress").NodeProgress(None, "Collecting"))


def a_model_compiled_before_or_behind_the_capture_is_refused():
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = comfy.sd.load_diffusion_model(file)
    observed, _ = watched(model)
    behind = observed.clone()
    set_torch_compile_wrapper(model=behind, backend="eager")
    by_patch = observed.clone()  # as other packs do it
    by_patch.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
    for sampled in (behind, by_patch):
        with refused("Remove the compile node"):
            sample(sampled)
    before = model.clone()
    set_torch_compile_wrapper(model=before, backend="eager")
    with refused("Remove the compile node"):
        watched(before)
    assert hooks(model) == 0


def steps_are_counted_whatever_the_guider():
    import comfy.samplers

    observed, capture = watched(comfy.sd.load_diffusion_model(file))
    sample(observed, 3)
    comfy.samplers.CFGGuider.outer_predict_noise = lambda self, *args, **kwargs: self.predict_noise(*args, **kwargs)
    sample(observed, 3)
    own, others = capture._collector.result().runs
    assert (
        list(own.steps) == list(others.steps) == [0, 1, 2]
        and own.steps == others.steps
        and set(own.labels) == set(others.labels)
    ), (own, others)
    assert own.sigmas == others.sigmas, (own, others)
    assert list(own.sigmas.values()) == sorted(own.sigmas.values(), reverse=True)


def collecting_can_be_cancelled_and_loses_nothing():
    model = comfy.sd.load_diffusion_model(file)
    observed, capture = watched(model)
    sample(observed)
    progress, spool = (
        pack("nodes.shared.progress").NodeProgress(None, "Collecting"),
        pack("nodes.shared.spool").spool_folder(),
    )
    before = set(spool.iterdir())
    comfy.model_management.interrupt_current_processing(True)
    try:
        capture.collect(progress)
    except comfy.model_management.InterruptProcessingException:
        pass
    else:
        raise AssertionError("it was not interrupted")
    assert set(spool.iterdir()) == before
    states = []

    class Listening(type(progress)):
        def __call__(self, state):
            super().__call__(state)
            states.append(state)

    handle, rows = capture.collect(Listening(None, "Collecting"))
    assert handle.path.is_file() and len(rows) == len(states) == states[-1].total_layers == len(capture.plan.decisions)
    assert capture.collect(progress)[0] is handle  # at once: nothing was sampled since
    handle.path.unlink()


with torch.inference_mode():
    globals()[function]()
