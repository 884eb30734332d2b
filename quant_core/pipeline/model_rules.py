"""What the kind of a model says about its layers, whatever anybody asks for: for the plan, and for verify after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.source import Source
from ..errors import Problem, Remedy
from ..policy.architectures import TEXT_ENCODER, Kind, KnownModel, in_numbered_block, recognise
from ..policy.general import Policy, name_rule

# What ComfyUI's embeddings read quantized, as they are called in files.
EMBEDDING_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
OUTSIDE = "outside the numbered blocks"
UNKNOWN = (
    "The model is none that QuantPress knows, so only layers in numbered blocks are quantized, and general rules for "
    "names decide about those: check the result."
)
_NOT_LINEAR: Mapping[Kind, str] = {
    "embedding": "an embedding of {}, not a linear layer",
    "parameter": "a parameter of {} that its code reads as it stands",
    "conv": "a convolution of {}, not a linear layer",
    "gate": "a gate of {} that its code reads as it stands",
}


@dataclass(frozen=True, slots=True)
class ModelRules:
    """known: the model of the file; None when the table has none like it.

    never_pack: layers whose weight must keep its shape, besides those that the table names.
    """

    known: KnownModel | None
    never_pack: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return "the model" if self.known is None else self.known.architecture.name

    def not_linear(self, layer: str) -> str | None:
        """Why no request can quantize the layer: ComfyUI reads its weight as it stands. None for a linear layer."""
        kind = None if self.known is None else self.known.kind_of(f"{layer}.weight")
        return None if kind in (None, "linear") else _NOT_LINEAR[kind].format(self.name)

    def is_embedding(self, layer: str) -> bool:
        return self.known is not None and self.known.kind_of(f"{layer}.weight") == "embedding"

    def keeps_shape(self, layer: str) -> bool:
        """Whether ComfyUI's detection reads the weight's shape, so that it must not be packed."""
        return layer in self.never_pack or (self.known is not None and self.known.shape_read(f"{layer}.weight"))

    def reason_to_keep(self, layer: str, policy: Policy) -> str | None:
        """Why the layer is not quantized; None when it is to be."""
        return self.not_linear(layer) or policy.reason_to_keep(layer, self._unasked)

    def _unasked(self, layer: str) -> str | None:
        """Why a layer that nobody names is not quantized."""
        known = self.known
        if known is None:
            return name_rule(layer) or (None if in_numbered_block(layer) else OUTSIDE)
        own = known.own_name(layer)
        if own is None:
            return name_rule(layer) or f"not a part of {self.name}"
        own = own.removeprefix(known.architecture.prefix)
        return name_rule(own) or (None if in_numbered_block(own) else OUTSIDE)

    def not_run_quantized(self) -> str | None:
        """Why ComfyUI draws nothing good with such a model when it is quantized. A sentence without the path."""
        known = self.known
        if known is None or known.architecture.runs_quantized:
            return None
        kind = known.architecture
        what = kind.sort if kind.name == kind.sort else f"{kind.sort}: {kind.name}"
        return (
            f"this is a {what}. ComfyUI does not run that quantized: it would take the numbers as they are stored, "
            "without their scales, or refuse them. Use it in 16 bits, it is small beside the diffusion model."
        )

    def not_found(self) -> str | None:
        """Why ComfyUI does not find the model's tensors. A sentence without the path."""
        known = self.known
        if known is None or known.comfyui_finds_it:
            return None
        where = [f"begin with {known.prefix!r}"] if known.prefix and not known.inner else []
        where += [f"contain {part!r}" for part in known.inner]
        return (
            f"the names of {self.name} {' and '.join(where)}, which ComfyUI does not take off, so it would not "
            "recognise the file. Take it off first: `quantpress merge extract` and the node Extract Diffusion Model "
            "do."
        )

    def problem(self) -> Problem | None:
        """Why such a model is not quantized, unless it is for another runtime than ComfyUI."""
        text = self.not_run_quantized() or self.not_found()
        return None if text is None else Problem(text, "other_runtime", Remedy.FORCE)

    def warnings(self, other_runtime: bool) -> tuple[str, ...]:
        """Sentences for the report. other_runtime: what the plan would refuse was asked for all the same."""
        if self.known is None:
            return (UNKNOWN,)
        problem, kind = self.problem(), self.known.architecture
        if problem is not None and other_runtime:
            return (f"Only for another runtime than ComfyUI: {problem.text}",)
        if kind.sort != TEXT_ENCODER or not kind.not_as:
            return ()
        types = " and ".join(kind.not_as)
        return (
            f"As a text encoder of type {types}, ComfyUI does not run {kind.name} quantized; as its others it does.",
        )


def rules_of(
    src: Source, decoded: Mapping[str, tuple[int, int]], never_pack: frozenset[str] = frozenset()
) -> ModelRules:
    """The model is recognised by names and shapes. decoded: {quantized layer: shape of its weight when decoded}."""
    shapes = {name: info.shape for name, info in src.tensors.items()}
    shapes |= {f"{layer}.weight": shape for layer, shape in decoded.items()}
    return ModelRules(recognise(shapes), never_pack)
