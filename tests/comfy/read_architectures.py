"""What one ComfyUI knows of the models in architecture_configs.json: its own classes, built on the meta device.

    read_architectures.py COMFYUI_DIR OUT.json        run by ComfyUI's Python; make_architectures.py starts it

No weights are needed. A model is built with operations that tell their modules apart from plain ones, so that a Linear
of the model is known from a bare Parameter; detection is run on a state dict that notes which shapes it reads.
"""

import importlib
import json
import sys
from pathlib import Path

comfyui, out = sys.argv[1:3]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402
import torch  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.ldm.audio.embedders  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
from comfyui_version import __version__  # noqa: E402

META = torch.device("meta")
HERE = Path(__file__).parent
CONFIGS = json.loads((HERE / "architecture_configs.json").read_text("utf-8"))
TEXT_ENCODERS = json.loads((HERE / "text_encoder_configs.json").read_text("utf-8"))
PREFIXES = ("", "model.", "model.model.", "net.", "model.diffusion_model.", "module.", "transformer.")
GATES = ("MoEGate", "GptOssTopKRouter")


class Operations(comfy.ops.manual_cast):
    """ComfyUI's operations, as classes of their own. What a model builds from these can be quantized."""

    class Linear(comfy.ops.manual_cast.Linear):
        pass

    class Embedding(comfy.ops.manual_cast.Embedding):
        pass

    class MoEExperts(torch.nn.Module):
        """A bank of experts, [experts, out_features, in_features], as ComfyUI's mixed precision operations have it."""

        def __init__(self, num_experts, in_features, out_features, bias=True, device=None, dtype=None):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(num_experts, out_features, in_features, device=META))


class Key(str):
    """A name that notes on `found` when detection looks for exactly this one, in a dict or in a list."""

    found: set[str] = set()

    def __eq__(self, other):
        equal = str.__eq__(self, other)
        if equal is True and not isinstance(other, Key):
            self.found.add(str(self))
        return equal

    __hash__ = str.__hash__


class Shape:
    """A tensor without values. Its name is noted on `read` when its shape is asked for."""

    read: set[str] = set()

    def __init__(self, name, tensor):
        self._name, self._tensor = name, tensor

    def __getattr__(self, attribute):
        if attribute in ("shape", "ndim", "size", "dim"):
            self.read.add(self._name)
        return getattr(self._tensor, attribute)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = [a._tensor if isinstance(a, Shape) else a for a in args]
        return torch.zeros(()) if function is torch.std else function(*plain, **(kwargs or {}))


class State(dict):
    """A state dict that notes what detection looks for."""

    def __init__(self, tensors):
        super().__init__({Key(name): Shape(name, tensor) for name, tensor in tensors.items()})
        Key.found, Shape.read = set(), set()

    def __getitem__(self, name):
        Key.found.add(str(name))
        return super().__getitem__(name)

    def get(self, name, default=None):
        if name in self:
            return self[name]
        return default


def kinds(model):
    """{tensor: kind} of the tensors with two dimensions or more; modules' weights by the module's name."""
    found = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in [*module._parameters.items(), *module._buffers.items()]:
            if parameter is None or parameter.dim() < 2 or name in module._non_persistent_buffers_set:
                continue
            whole = prefix + name
            if name != "weight":
                found[whole] = "parameter"
            elif isinstance(module, Operations.Linear):
                found[module_name] = "linear"
            elif isinstance(module, (Operations.Embedding, torch.nn.Embedding)):
                found[module_name] = "embedding"
            elif isinstance(module, torch.nn.modules.conv._ConvNd):
                found[module_name] = "conv"
            elif type(module).__name__ in GATES:
                found[module_name] = "gate"
            else:
                found[whole] = "parameter"
    return found


def described(tensors, detect):
    """What detection answers, and the record of what it looked at: tensors that it found, and shapes that it read."""
    state = State(tensors)
    detected = detect(state)
    signs = {name: list(tensors[name].shape) for name in sorted(Key.found) if name in tensors}
    reads = sorted(name for name in Shape.read if tensors[name].dim() >= 2)
    return detected, {"signs": signs, "reads": reads}


def built_diffusion_model(config):
    """(what ComfyUI knows of the variant, the model, without weights); None where this ComfyUI does not know it."""
    config = dict(config)
    if "nerf_embedder_dtype" in config:
        config["nerf_embedder_dtype"] = torch.float32
    on = torch.device(config.pop("device", "meta"))  # some constructors read what they computed
    known = comfy.model_detection.model_config_from_unet_config(dict(config), None)
    if known is None:
        return None
    known.custom_operations = Operations
    known.set_inference_dtype(torch.bfloat16, None)
    with on:
        return known, known.get_model({}, "", device=on).diffusion_model


def detect_diffusion_model(state):
    """As its loader does; None where it knows no such model."""
    found = comfy.model_detection.detect_unet_config(state, "")
    return None if found is None else comfy.model_detection.model_config_from_unet_config(found, state, "")


def diffusion_model(config, prefix):
    """The record of one variant; None where this ComfyUI does not know it. prefix: of the names that it detects."""
    built = built_diffusion_model(config)
    if built is None:
        return None
    known, model = built
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    detected, record = described(tensors, detect_diffusion_model)
    if type(detected) is not type(known):
        raise SystemExit(f"{type(known).__name__} is detected as {type(detected).__name__}: correct its config.")
    return {**record, "kinds": kinds(model)}


def class_of(entry):
    """The class of a text encoder; None where this ComfyUI does not have it."""
    module, _, name = entry["class"].partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError):
        return None
    return type(name, (found,), {"model_type": entry["model_type"]}) if "model_type" in entry else found


def built(cls, config):
    """A text encoder on the meta device. config: a file of ComfyUI's, or values."""
    if isinstance(config, str):
        config = json.loads((Path(comfyui) / "comfy" / config).read_text("utf-8"))
    with META:
        if cls.__name__ == "GptOssModel":
            return cls(comfy.text_encoders.gpt_oss.GptOss20BConfig(), device=META, ops=Operations)
        if cls.__name__ == "MiniMaxH3VideoVAE":
            return cls(operations=Operations)
        if cls.__name__ == "MiniMaxMusic3TEModel":
            return cls(META, model_options={"custom_operations": Operations}, projection_config=config)
        return cls(config, torch.bfloat16, META, Operations)


def in_file(entry, model):
    """The tensors of a text encoder and their kinds, under the names that its file has."""

    def named(name):
        start = next((start for start in entry.get("file", {}) if name.startswith(start)), "")
        return entry["file"][start] + name[len(start) :] if start else name

    tensors = {named(name): tensor for name, tensor in model.state_dict().items()}
    return tensors, {named(name): kind for name, kind in kinds(model).items()}


def text_encoder(entry):
    """The record of a text encoder, under the names that its file has; None where this ComfyUI does not have it."""
    cls = class_of(entry)
    if cls is None:
        return None
    tensors, kind_of = {}, {}
    for config in entry.get("configs", [{}]):
        more, kinds_of_more = in_file(entry, built(cls, config))
        tensors, kind_of = tensors | more, kind_of | kinds_of_more
    detected, record = described(tensors, comfy.sd.detect_te_model)
    if getattr(detected, "name", None) != entry["detected"]:
        raise SystemExit(f"{entry['name']} is detected as {detected}: correct its config.")
    marks = {mark.lstrip("!").partition(" ")[0] for marks in entry["marks"] for mark in marks}
    record["signs"] |= {name: list(tensors[name].shape) for name in sorted(marks & set(tensors))}
    runs = {clip_type: runs_quantized(tensors, clip_type) for clip_type in entry["types"]}
    return {**record, "kinds": kind_of, "runs_quantized": runs}


class Asked(Exception):
    """Quantized operations were asked for."""


def runs_quantized(tensors, clip_type):
    """Whether ComfyUI's loader builds this model with quantized operations when the file describes a layer."""
    targets = []

    def ask(*args, **kwargs):
        raise Asked

    def target_of(target, model_options=None, **kwargs):
        targets.append((target, model_options or {}))

    real_clip, real_operations = comfy.sd.CLIP, comfy.ops.mixed_precision_ops
    comfy.sd.CLIP, comfy.ops.mixed_precision_ops = target_of, ask
    state = {**tensors, "model.layers.0.self_attn.q_proj.comfy_quant": torch.zeros(1, dtype=torch.uint8)}
    try:
        if clip_type == "VAE":
            comfy.sd.VAE(sd=state)
            return False
        comfy.sd.load_text_encoder_state_dicts([state], clip_type=comfy.sd.CLIPType[clip_type])
        target, options = targets[0]
        with META:
            target.clip(device=META, dtype=torch.bfloat16, model_options=options, **target.params)
    except Asked:
        return True
    finally:
        comfy.sd.CLIP, comfy.ops.mixed_precision_ops = real_clip, real_operations
    return False


def prefixes():
    """[names, the prefix that ComfyUI's loader takes off them], of some lists of names."""
    examples = [[f"{prefix}blocks.{n}.q" for n in range(count)] for prefix in PREFIXES for count in (3, 6)]
    examples.append([f"model.diffusion_model.{n}" for n in range(6)] + [f"net.{n}" for n in range(9)])
    answers = []
    for names in examples:
        prefix = comfy.model_detection.unet_prefix_from_state_dict(dict.fromkeys(names))
        answers.append([names, prefix if any(name.startswith(prefix) for name in names) else ""])
    return answers


def prepare():
    """Constructors read numbers that they made themselves (a codebook's size, a rate of dropout), and other files."""
    comfy.ldm.audio.embedders.NumberConditioner.load_state_dict = lambda self, *args, **kwargs: None
    item = torch.Tensor.item
    torch.Tensor.item = lambda self: 1 if self.is_meta else item(self)


def main():
    prepare()
    models = {}
    for family, entry in CONFIGS.items():
        for variant, config in entry["variants"].items():
            record = diffusion_model(config, entry.get("prefix", ""))
            if record is not None:
                models.setdefault(family, {})[variant] = record
    encoders = {name: record for name, entry in TEXT_ENCODERS.items() if (record := text_encoder(entry))}
    found = {"comfyui": __version__, "models": models, "text_encoders": encoders, "prefixes": prefixes()}
    Path(out).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
