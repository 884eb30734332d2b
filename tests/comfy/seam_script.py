"""Run by ComfyUI's Python: checks of the seam on ComfyUI's own classes, one function each, run by test_seam.py.

    seam_script.py COMFYUI_DIR PACK_DIR FUNCTION [FILE]
A failed check is an AssertionError and a non-zero exit status.
"""

import asyncio
import io
import json
import logging
import sys
import tempfile
from pathlib import Path

comfyui, pack_dir, function, *files = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu", "--disable-all-custom-nodes"]

import comfy.options  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.quant_ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
from comfy_kitchen.tensor import QuantizedTensor  # noqa: E402

import nodes  # noqa: E402

ORIGINAL = comfy.ops.mixed_precision_ops
LOGGED = io.StringIO()


def load_pack():
    """As ComfyUI does; the pack's modules by their name below it."""
    logging.getLogger().addHandler(logging.StreamHandler(LOGGED))
    logging.getLogger().setLevel(logging.INFO)
    assert asyncio.run(nodes.load_custom_node(pack_dir))
    return lambda name: sys.modules[pack_dir.replace(".", "_x_") + "." + name]


def stored(pack, fmt, w, layer="l"):
    """A state dict of one quantized layer with a bias."""
    metadata = pack("quant_core.checkpoint.metadata")
    state = {f"{layer}.{suffix}": tensor for suffix, tensor in fmt.quantize(w).items()}
    state[f"{layer}.comfy_quant"] = metadata.encode_config(fmt.config(tuple(w.shape), torch.bfloat16))
    return state | {f"{layer}.bias": torch.arange(w.shape[0], dtype=torch.bfloat16) / 64}


def model(ops, n, k):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.l = ops.Linear(k, n, dtype=torch.bfloat16)

    return Net()


def every_format():
    pack = load_pack()
    return pack, pack("quant_core.formats").all_formats()


def registering_twice_wraps_once():
    pack = load_pack()
    wrapped, seam = comfy.ops.mixed_precision_ops, pack("layouts.comfyui")
    loader = comfy.model_base.BaseModel.load_model_weights
    entries = dict(comfy.quant_ops.QUANT_ALGOS)
    assert wrapped is not ORIGINAL and wrapped.__wrapped__ is ORIGINAL
    assert seam.register().installed and seam.status().installed
    assert comfy.ops.mixed_precision_ops is wrapped and comfy.model_base.BaseModel.load_model_weights is loader
    assert entries == comfy.quant_ops.QUANT_ALGOS
    assert "the loaders of this ComfyUI now take" in LOGGED.getvalue()
    formats = pack("layouts.comfyui_formats")
    assert formats.native_formats() == set(entries) - set(formats.our_formats())


def what_is_returned_is_still_comfyuis_class():
    load_pack()
    ops = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    assert issubclass(ops, comfy.ops.manual_cast) and issubclass(ops.Linear, comfy.ops.CastWeightBiasOp)
    assert ops._compute_dtype is torch.bfloat16 and ops.Conv2d is comfy.ops.manual_cast.Conv2d


def same_bits(x, y):
    """Also where ComfyUI shows the bytes of a block scale under a dtype of its own (mxfp8)."""
    return (
        x.shape == y.shape
        and x.dtype.itemsize == y.dtype.itemsize
        and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (x, y)))
    )


def every_format_loads_runs_and_saves_the_same_bits():
    pack, formats = every_format()
    torch.manual_seed(0)
    w, x = torch.randn(256, 512), torch.randn(2, 5, 512)
    for fmt in formats:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            ops, state = comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=True), stored(pack, fmt, w)
            kept = {key: tensor.clone() for key, tensor in state.items()}
            net = model(ops, 256, 512)
            missing, unexpected = net.load_state_dict(dict(state), strict=False)
            assert not missing and not unexpected, (fmt.name, missing, unexpected)
            assert isinstance(net.l.weight, QuantizedTensor) and net.l.weight.dtype is dtype
            with torch.inference_mode():
                out = net.l(x.to(dtype))
            exact = (
                x.to(dtype).float() @ fmt.dequantize({k.removeprefix("l."): v for k, v in state.items()}, (256, 512)).T
                + state["l.bias"].float()
            )
            error = float((out.float() - exact).norm() / exact.norm())
            # comfy-kitchen's AWQ layout promotes its bfloat16 scales. So float16 comes out as float32, in stock
            # ComfyUI too.
            assert out.dtype is dtype or (fmt.name, dtype) == ("awq_w4a16", torch.float16), (fmt.name, out.dtype)
            bound = 0.2 if fmt.name == "convrot_w4a4" else 0.05 if fmt.runtime.quantizes_input else 0.01
            assert error < bound, (fmt.name, dtype, error)
            saved = net.state_dict()
            for key, tensor in kept.items():
                if key.endswith("comfy_quant"):
                    assert json.loads(bytes(saved[key].tolist())) == json.loads(bytes(tensor.tolist())), fmt.name
                elif not key.endswith("bias"):
                    assert same_bits(saved[key], tensor), (fmt.name, key)
            assert all(same_bits(state[key], kept[key]) for key in kept)  # loading writes to nothing: files are mapped


def the_older_packs_matmul_error_cannot_come_back():
    """A packed weight without its comfy_quant entry, or in a class that is not ours, is what reached mm as uint8."""
    pack, formats = every_format()
    errors = pack("quant_core.errors")
    w = torch.randn(128, 256)
    for fmt in formats:
        if fmt.runtime.native_since is not None:
            continue
        ops = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
        net, state = model(ops, 128, 256), stored(pack, fmt, w)
        del state["l.weight"]
        fails(errors.InputFileError, "l: the file calls it", net.load_state_dict, state, strict=False)
        state = stored(pack, fmt, w)
        scale = next(key for key in state if key.startswith("l.weight_"))
        state[scale] = state[scale].reshape(-1)[:3].clone()
        fails(errors.QuantPressError, "l", model(ops, 128, 256).load_state_dict, state, strict=False)
        net = torch.nn.Module()
        net.l = ops.Embedding(128, 256)
        fails(errors.InputFileError, "l.weight is", net.load_state_dict, stored(pack, fmt, w), strict=False)


def fails(kind, text, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind as err:
        assert text in str(err), err
        return
    raise AssertionError(f"{text}: nothing was raised")


def unknown_fields_of_native_formats_survive():
    pack, formats = every_format()
    fmt = next(fmt for fmt in formats if fmt.name == "int8_rowwise")
    state, ops = stored(pack, fmt, torch.randn(64, 128)), comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    net = model(ops, 64, 128)
    net.load_state_dict(dict(state), strict=False)
    assert json.loads(bytes(net.state_dict()["l.comfy_quant"].tolist())) == {
        "format": "int8_tensorwise",
        "per_row": True,
    }


def layers_without_an_entry_stay_comfyuis_business():
    load_pack()
    ops = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    net = model(ops, 8, 16)
    net.load_state_dict({"l.weight": torch.ones(8, 16), "l.bias": torch.zeros(8)}, strict=True)
    assert type(net.l.weight) is torch.nn.Parameter and "l.comfy_quant" not in net.state_dict()


def a_partly_loaded_model_gives_the_same_latents_as_a_whole_one():
    """What --lowvram does (it does not go with --cpu): most layers stay offloaded and are cast for each call."""
    load_pack()
    for file in files:
        outs = [partly_loaded_output(file, full_load) for full_load in (True, False)]
        assert torch.equal(*outs) and bool(torch.isfinite(outs[0]).all()), file


def partly_loaded_output(file, full_load):
    with torch.inference_mode():  # as ComfyUI executes nodes
        patcher = comfy.sd.load_diffusion_model(file)
        patcher.load(torch.device("cpu"), lowvram_model_memory=1, full_load=full_load)
        assert patcher.model.model_lowvram is not full_load
        torch.manual_seed(0)
        x, t = torch.randn(1, 16, 8, 8), torch.tensor([0.5])
        out = patcher.model.diffusion_model(x, t, context=torch.randn(1, 8, 128), y=torch.randn(1, 128))
    patcher.detach()
    return out


def load_clip_gives_a_text_encoder_our_layers():
    """Stock Load CLIP: a Qwen3-0.6B encoder whose first block is quantized, one format of ours for each matrix."""
    pack = load_pack()
    get_format = pack("quant_core.formats").get_format
    shapes = {
        "self_attn.q_proj": (2048, 1024),
        "self_attn.k_proj": (1024, 1024),
        "self_attn.v_proj": (1024, 1024),
        "self_attn.o_proj": (1024, 2048),
        "mlp.gate_proj": (3072, 1024),
        "mlp.up_proj": (3072, 1024),
        "mlp.down_proj": (1024, 3072),
    }
    names = (
        "bnb_nf4",
        "float8_e4m3fn_rowwise",
        "int8_blockwise",
        "float8_e4m3fn_block3d",
        "bnb_af4",
        "int8_lodewise",
        "nvfp4",
    )
    state, weights = {}, {}
    for (part, shape), name in zip(shapes.items(), names, strict=True):
        layer = f"model.layers.0.{part}"
        weights[part] = torch.randn(shape) * 0.02
        state |= {
            k: v for k, v in stored(pack, get_format(name), weights[part], layer).items() if not k.endswith(".bias")
        }
    for norm, size in (
        ("input_layernorm", 1024),
        ("post_attention_layernorm", 1024),
        ("self_attn.q_norm", 128),
        ("self_attn.k_norm", 128),
    ):
        state[f"model.layers.0.{norm}.weight"] = torch.ones(size)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder, "encoder.safetensors")
        safetensors.torch.save_file(state, path)
        clip = comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
        block = next(m for n, m in clip.cond_stage_model.named_modules() if n.endswith("model.layers.0"))
        for part, name in zip(shapes, names, strict=True):
            linear = block.get_submodule(part)
            assert isinstance(linear.weight, QuantizedTensor), part
            assert (linear.weight._layout_cls.startswith("QuantPress")) is (name != "nvfp4"), linear.weight
            x = torch.randn(2, 3, shapes[part][1])  # text encoders run in float32 here
            wanted = torch.nn.functional.linear(x, weights[part])
            got = linear(x)
            assert got.dtype == x.dtype and float((got - wanted).norm() / wanted.norm()) < 0.12, part


def checkpoint_save_keeps_every_bit_of_our_layers():
    """CheckpointSave's function, with the model of a file and a VAE, and the stock checkpoint loader afterwards."""
    load_pack()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for file in files[1:]:
            model = comfy.sd.load_diffusion_model(file)
            vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(files[0]))
            saved = Path(folder, "saved.safetensors")
            comfy.sd.save_checkpoint(str(saved), model, vae=vae)
            ours, theirs = safetensors.torch.load_file(file), safetensors.torch.load_file(saved)
            for name, tensor in ours.items():
                other = theirs["model.diffusion_model." + name]
                if name.endswith(".comfy_quant"):
                    assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(other.tolist())), name
                elif name.rpartition(".")[0] + ".comfy_quant" in ours and not name.endswith(".bias"):
                    assert tensor.dtype == other.dtype and torch.equal(tensor, other), name
            again = comfy.sd.load_checkpoint_guess_config(str(saved), output_clip=False)[0]
            # All bits are equal. But kept weights were cast from bf16 in one, and lie in the file's float32 in the
            # other. The matrix product of a CPU depends on how its operands are aligned.
            one, other = output_of(comfy.sd.load_diffusion_model(file)), output_of(again)
            assert float((one - other).norm() / one.norm()) < 1e-5, file


def output_of(patcher):
    torch.manual_seed(0)
    patcher.load(torch.device("cpu"))
    x, t = torch.randn(1, 16, 8, 8), torch.tensor([0.5])
    return patcher.model.diffusion_model(x, t, context=torch.randn(1, 8, 128), y=torch.randn(1, 128))


globals()[function]()
