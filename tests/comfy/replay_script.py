"""Run by ComfyUI's Python: checks of recorded calls and of their replay, one function each, run by test_replay.py.

    replay_script.py COMFYUI_DIR PACK_DIR MODEL_FOLDER FUNCTION...
Prints "passed FUNCTION" after each. A failed check is an AssertionError and the end.
"""

import asyncio
import importlib
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

comfyui, pack_dir, folder, *functions = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu", "--disable-all-custom-nodes"]

import comfy.options  # noqa: E402
import torch  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402

import nodes  # noqa: E402

assert asyncio.run(nodes.load_custom_node(pack_dir))
NAMES = ("trained_sd3", "random_flux", "random_wan")


def pack(name):
    return importlib.import_module(pack_dir.replace(".", "_x_") + "." + name)


def load(name="trained_sd3"):
    return comfy.sd.load_diffusion_model(str(Path(folder) / f"{name}.safetensors"))


def watched(model, calls=100, accumulate=True):
    budget, capturing = (
        pack("quant_core.calibration.capture.budget").Budget,
        pack("quant_core.calibration.capture.collector").CaptureSettings,
    )
    return pack("nodes.jobs.capture_activations").watch(
        model, "", budget(2**28, 2**28, hessians=False), capturing(), calls, accumulate
    )


def sample(model, steps=2, seed=0, change=lambda positive: None, **options):
    conditioning = pack("nodes.jobs.try_conditioning").conditioning
    positive, negative = conditioning(model, "noise", 1), conditioning(model, "zeros", 0)
    change(positive[0][1])
    latent = torch.zeros(1, 16, 1, 8, 8) if "WAN" in type(model.model).__name__ else torch.zeros(1, 16, 8, 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    return comfy.sample.sample(
        model,
        noise,
        steps,
        3.0,
        "euler",
        "simple",
        positive,
        negative,
        latent,
        seed=seed,
        disable_pbar=True,
        **options,
    )


def rows_seen(capture):
    return {layer: statistics.seen for layer, statistics in capture._collector.result().statistics.items()}


def collected(capture):
    """The recorded calls as Quantize Model gets them: from the file."""
    handle, rows = capture.collect(pack("nodes.shared.progress").NodeProgress(None, "Collecting"))
    text = pack("nodes.shared.calibration_text").table(handle.path, rows, capture.plan)
    with pack("quant_core.calibration.storage").open_calibration(handle.path) as reader:
        calls, keys = list(reader.calls()), [kept.key for kept in reader.header.calls.kept]
    handle.path.unlink()
    return dict(zip(keys, calls, strict=True)), text


@contextmanager
def inputs_of_layers(root, seen):
    """Appends (layer, input) of every linear layer's call to seen(), a list that the call's owner gives."""
    layers = pack("quant_core.calibration.capture.linear_modules").linear_modules(root)
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen().append((name, args[0].clone())))
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sampled_with_inputs(observed, **options):
    """One list of layers' inputs per call of the model."""
    by_call, root = [], observed.model.diffusion_model
    begin = root.register_forward_pre_hook(lambda module, args: by_call.append([]))
    with inputs_of_layers(root, lambda: by_call[-1]):
        sample(observed, **options)
    begin.remove()
    return by_call


def replayed_inputs(model, call, device):
    seen = []
    with inputs_of_layers(model.model.diffusion_model, lambda: seen):
        assert pack("nodes.jobs.replay").replay(model, call, device) is None
    return seen


def assert_same(one, other):
    assert [name for name, _ in one] == [name for name, _ in other] and len(one) > 10
    for (name, a), (_, b) in zip(one, other, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b), name


def key(run, call):
    return pack("quant_core.calibration.calls").call_key(0, run, call)


@contextmanager
def refused(said):
    try:
        yield
    except pack("quant_core.errors").RequestError as err:
        assert said in str(err), err
    else:
        raise AssertionError(f"nothing was refused: {said}")


def check_replays_give_the_layers_their_inputs_to_the_bit():
    for name in NAMES:
        model = load(name)
        observed, capture = watched(model)
        by_call = sampled_with_inputs(observed, steps=3) + sampled_with_inputs(observed, steps=2, seed=4)
        calls, text = collected(capture)
        assert f"model calls kept: {len(by_call)} of {len(by_call)}, " in text and "could not" not in text, text
        place = {key(run, call): at for at, (run, call) in enumerate([(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)])}
        assert len(by_call) == 5 and calls.keys() == place.keys()
        replay, before = pack("nodes.jobs.replay"), rows_seen(capture)
        for given in (model, observed):  # the capture's own output does as well: it adds nothing to the record
            replay.replayable(given)
            with replay.loaded(given, 10**6) as (root, device):
                assert root is model.model.diffusion_model and device == given.load_device
                for number, call in calls.items():
                    assert_same(by_call[place[number]], replayed_inputs(given, call, device))
            assert model.model.current_patcher is None
        assert (
            rows_seen(capture) == before
            and capture.calls.offered == 5
            and calls[key(1, 0)].arguments["transformer_options"]["cond_or_uncond"] == [1, 0]
        )


def check_a_replay_takes_part_in_what_other_nodes_do_with_calls_once():
    changed = load().clone()
    for number in (1, 2):

        def louder(executor, x, t, *args, number=number, **kwargs):
            return executor(x * (1 + number / 8), t, *args, **kwargs)

        if number == 2:
            changed, capture = watched(changed)
        changed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, f"louder {number}", louder)
    by_call = sampled_with_inputs(changed, steps=2)
    calls, _ = collected(capture)
    with pack("nodes.jobs.replay").loaded(changed, 0) as (_, device):
        for call in range(2):
            assert_same(by_call[call], replayed_inputs(changed, calls[key(1, call)], device))


def check_threads_that_take_turns_at_every_layer_give_the_same_inputs():
    model = load()
    observed, capture = watched(model)
    by_call = sampled_with_inputs(observed, steps=3)
    calls, _ = collected(capture)
    seen, errors, switches = {0: [], 1: []}, [], [0]
    turn, now, done, me = threading.Condition(), [0], set(), threading.local()

    def hand_over():
        with turn:
            if 1 - me.number not in done:
                now[0] = 1 - me.number
                switches[0] += 1
                turn.notify_all()
            assert turn.wait_for(lambda: now[0] == me.number, 60)

    def paused(module, args):
        seen[me.number].append((names[module], args[0].clone()))
        hand_over()

    def run(number, device):
        me.number = number
        try:
            with turn:
                assert turn.wait_for(lambda: now[0] == number, 60)
            with torch.inference_mode():
                pack("nodes.jobs.replay").replay(model, calls[key(1, number)], device)
        except BaseException as err:  # to be raised by the main thread
            errors.append(err)
        with turn:
            done.add(number)
            now[0] = 1 - number
            turn.notify_all()

    names = {
        module: name
        for name, module in pack("quant_core.calibration.capture.linear_modules")
        .linear_modules(model.model.diffusion_model)
        .items()
    }
    handles = [module.register_forward_pre_hook(paused) for module in names]
    with pack("nodes.jobs.replay").loaded(model, 0) as (_, device):
        threads = [threading.Thread(target=run, args=(number, device)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for handle in handles:
        handle.remove()
    assert not errors and switches[0] > len(names), (errors, switches)
    for number in (0, 1):
        assert_same(by_call[number], seen[number])


def check_what_would_make_a_replay_wrong_is_refused():
    replayable = pack("nodes.jobs.replay").replayable
    model = load()
    replayable(model)
    patched = model.clone()
    weight = "diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    patched.add_patches({weight: ("diff", (torch.zeros_like(model.model_state_dict()[weight]),))})
    with refused("1 of its weights are patched"):
        replayable(patched)
    injected = model.clone()
    injected.set_injections("bypass_lora", [])
    with refused("changes its layers while it runs (bypass_lora)"):
        replayable(injected)
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = model.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    with refused("Remove the compile node"):
        replayable(compiled)
    from comfy_extras.nodes_easycache import EasyCacheNode

    with refused("EasyCache would leave out calls"):
        replayable(EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).args[0])
    small = comfy.sd.load_diffusion_model(
        str(Path(folder) / "trained_sd3.safetensors"), {"dtype": torch.float8_e4m3fn}
    )
    with refused("of its layers are not 16-bit or 32-bit floats"):
        replayable(small)


def check_calls_that_a_replay_would_not_repeat_are_not_kept_but_counted():
    model = load()
    observed, capture = watched(model)
    observed.model_options["transformer_options"]["of the model"] = object()  # a replay has it as well
    observed.model_options["transformer_options"]["patches"] = {"double_block": [lambda args: args]}
    sample(observed)

    def with_more(name, value):
        def outer_sample(executor, *args, **kwargs):
            options = executor.class_obj.model_options = comfy.model_patcher.create_model_options_clone(
                executor.class_obj.model_options
            )
            options["transformer_options"].setdefault(name, {}).update(value)
            return executor(*args, **kwargs)

        clone = observed.clone()
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", outer_sample)
        return clone

    sample(with_more("of a run", {"scale": 0.5, "tensor": torch.ones(2)}))
    assert len(capture.calls.kept) == 4 and capture.calls.refused == 0
    kept = list(capture.calls.calls())
    assert sum("of a run" in call.arguments["transformer_options"] for call in kept) == 2
    assert not any("of the model" in call.arguments["transformer_options"] for call in kept)
    for name, value in (("of a run", {"an object": object()}), ("patches", {"middle_patch": [lambda args: args]})):
        sample(with_more(name, value))
    assert len(capture.calls.kept) == 4 and (capture.calls.refused, capture.calls.offered) == (4, 8)
    assert "model calls kept: 4 of 8, " in (text := collected(capture)[1]) and "; 4 could not be kept" in text, text


def check_only_calls_of_a_captured_sampling_are_kept_and_as_many_as_asked_for():
    model = load()
    observed, capture = watched(model, calls=3)
    sample(model)
    assert capture.calls.offered == 0
    sample(observed, steps=6)
    first = list(collected(capture)[0])
    assert first == sorted(key(1, call) for call in range(6))[:3]
    call = collected(capture)[0][first[0]]
    options = pack("nodes.jobs.replay").own_options(observed)
    with pack("nodes.jobs.replay").loaded(observed, 0):
        options["wrappers"][WrappersMP.APPLY_MODEL] = {
            "x": observed.get_wrappers(WrappersMP.APPLY_MODEL, pack("nodes.shared.model_state").KEY)
        }
        model.model.apply_model(
            call.arguments["x"],
            call.arguments["t"],
            c_crossattn=call.arguments["c_crossattn"],
            y=call.arguments["y"],
            transformer_options=options,
        )
    assert capture.calls.offered == 6
    none, capture = watched(model, calls=0)
    sample(none)
    calls, text = collected(capture)
    assert not calls and "model calls kept" not in text


def check_start_over_forgets_the_calls_once_they_are_collected():
    observed, capture = watched(load(), accumulate=False)
    runs = []
    for _ in range(2):
        sample(observed)
        runs.append(collected(capture)[0])
        assert not capture.calls.kept
    assert runs[0].keys() == runs[1].keys() == {key(1, 0), key(1, 1)}
    assert all(torch.equal(call.arguments["x"], runs[1][number].arguments["x"]) for number, call in runs[0].items())


def check_loading_leaves_the_room_that_is_asked_for_and_ends_like_a_sampling():
    model, replay = load(), pack("nodes.jobs.replay")
    observed, capture = watched(model)
    sample(observed)
    calls, _ = collected(capture)
    needed = replay.call_bytes(
        model,
        {name: value.shape for name, value in calls[key(1, 0)].arguments.items() if isinstance(value, torch.Tensor)},
    )
    x = calls[key(1, 0)].arguments["x"]
    assert needed == int(model.model.memory_required(list(x.shape))) > 0 and x.shape[0] == 2
    ran, asked, plain = [], [], comfy.model_management.load_models_gpu
    clone = model.clone()
    for kind in ("ON_PRE_RUN", "ON_CLEANUP"):
        clone.add_callback(
            getattr(comfy.patcher_extension.CallbacksMP, kind), lambda patcher, kind=kind: ran.append(kind)
        )
    comfy.model_management.load_models_gpu = lambda models, memory_required=0: (
        asked.append(memory_required) or plain(models, memory_required)
    )
    try:
        with replay.loaded(clone, 12345) as (root, _):
            assert ran == ["ON_PRE_RUN"] and model.model.current_patcher is None
            raise KeyError
    except KeyError:
        assert ran == ["ON_PRE_RUN", "ON_CLEANUP"] and asked == [12345]
    finally:
        comfy.model_management.load_models_gpu = plain
    sample(model)  # the model can be sampled as before


def check_what_a_model_keeps_from_call_to_call_is_forgotten():
    model, cleared = load(), []
    observed, capture = watched(model)
    sample(observed, steps=1)
    model.model.diffusion_model.clear_kv_cache = lambda: cleared.append(1)
    with pack("nodes.jobs.replay").loaded(model, 0) as (_, device):
        for _ in range(2):
            pack("nodes.jobs.replay").replay(model, next(capture.calls.calls()), device)
        assert len(cleared) == 2
    assert len(cleared) == 3


def check_the_compiler_of_newer_versions_is_off_while_hooks_must_see_every_call():
    args, seen = comfy.cli_args.args, []
    assert not hasattr(args, "disable_comfy_compiler")
    model = load()
    observed, capture = watched(model)
    begin = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, given: seen.append(getattr(args, "disable_comfy_compiler", None))
    )
    sample(observed)
    args.disable_comfy_compiler = False
    sample(observed)
    sample(model)
    with pack("nodes.jobs.replay").loaded(model, 0) as (_, device):
        pack("nodes.jobs.replay").replay(model, next(capture.calls.calls()), device)
    begin.remove()
    before = args.disable_comfy_compiler
    del args.disable_comfy_compiler
    assert before is False and seen == [None, None, True, True, False, False, True], seen


with torch.inference_mode():
    for function in functions:
        globals()[function]()
        print("passed", function, flush=True)
