"""A safe policy for any architecture: linear weights inside the blocks are quantized, the sensitive rest is kept.

Names are matched without their checkpoint prefix. The tables per architecture come on top of this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import PlanError, Problem, counted
from ..names.prefixes import strip_prefix
from .recipe import Recipe

# (why a layer is kept, what its name looks like). The first rule that matches is named in the plan.
_RULES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (why, re.compile(pattern, re.IGNORECASE))
    for why, pattern in (
        ("part of the VAE", r"^(first_stage_model|vae|vae_decoder|vae_encoder|audio_vae|vocoder)\."),
        ("a text encoder inside a checkpoint", r"^(cond_stage_model|conditioner|text_encoders?|clip_[lgh]|t5xxl)\."),
        ("norm", r"norm|(^|[._])ln(_\w+|\d*)?($|\.)"),
        ("modulation", r"modulation|adaln|scale_shift|(^|[._])mod($|[._])|_mod\d*($|\.)|emb_layers"),
        ("embedding", r"embed|(^|[._])emb($|[._])|(^|\.)shared$|time_projection|pos_enc"),
        (
            "input layer",
            r"^\w*(img|txt|time|timestep|vector|guidance|context|input|y|cond|llm|text|caption|vision|pooled)_?"
            r"(in|projection|proj_in|cond_proj|patchify_proj)($|\.)|^(proj_in|patchify_proj|input_blocks\.0\.|"
            r"conv_in|first|input_proj|project_in|to_cond_embed|cap_\w+|audio_patchify_proj)",
        ),
        (
            "output layer",
            r"^(final_layer|final_\w+|last_layer|last|proj_out|out|head|lm_head|output|conv_out|unpatchify|"
            r"project_out|audio_proj_out|img_out|nerf_final\w*)($|\.)|lm_head|distilled_guidance_layer",
        ),
        ("gate or router", r"(^|\.)(router|gate_logits|to_gate_logits)($|\.)"),
    )
)

NOT_NAMED = "not named in only"


@dataclass(frozen=True, slots=True)
class Rule:
    """What the layers get whose name (without `.weight`) the regex is found in.

    recipe: None keeps them. config: keys added to their comfy_quant object.
    """

    pattern: str
    recipe: Recipe | None
    config: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """JSON object for the file's header."""
        described: dict[str, Any] = {
            "pattern": self.pattern,
            "recipe": self.recipe.describe() if self.recipe else None,
        }
        return described | ({"config": dict(self.config)} if self.config else {})


@dataclass(frozen=True, slots=True)
class Policy:
    """Which layers are quantized. keep, only: regexes searched in the layer's name (without `.weight`).

    keep: these stay. only: nothing else is quantized, and the name rules do not apply to these: who names a layer
    wants it. keep wins over only. fallback: the recipe for layers whose shape the main format cannot take, or whose
    weight must not be packed. rules: recipes for single layers; the first that matches wins, over all of the above.
    config: keys added to the comfy_quant object of every quantized layer.
    """

    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    fallback: Recipe | None = None
    rules: tuple[Rule, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def check(self, layers: Iterable[str]) -> None:
        """PlanError: a regex that does not compile, or that matches no layer."""
        layers, problems = list(layers), []
        for setting, patterns in (
            ("keep", self.keep),
            ("only", self.only),
            ("rules", tuple(rule.pattern for rule in self.rules)),
        ):
            for pattern in patterns:
                try:
                    matches = any(re.search(pattern, layer) for layer in layers)
                except re.error as err:
                    text = (
                        f"{pattern!r} is not a regular expression: {err}. Escape dots as \\. and brackets as \\( \\)."
                    )
                    problems.append(Problem(text, setting))
                    continue
                if not matches:
                    example = f" Layers are called like {layers[len(layers) // 2]!r}." if layers else ""
                    text = f"{pattern!r} matches none of the {counted(len(layers), 'linear layer')}.{example}"
                    problems.append(Problem(text, setting))
        if problems:
            raise PlanError(problems)

    def rule_for(self, layer: str) -> Rule | None:
        """The rule that decides about this layer; None when the general ones do."""
        return next((rule for rule in self.rules if re.search(rule.pattern, layer)), None)

    def reason_to_keep(self, layer: str, unasked: Callable[[str], str | None]) -> str | None:
        """Why this linear layer stays in its source dtype; None when it is to be quantized.

        unasked: that of a layer which nobody names.
        """
        rule = self.rule_for(layer)
        if rule is not None:
            return f"rule {rule.pattern}" if rule.recipe is None else None
        for pattern in self.keep:
            if re.search(pattern, layer):
                return f"named in keep ({pattern})"
        if self.only:
            return None if any(re.search(pattern, layer) for pattern in self.only) else NOT_NAMED
        return unasked(layer)


def name_rule(layer: str) -> str | None:
    """The general rule that keeps a layer of this name, in words; None when no rule does."""
    bare = strip_prefix(layer)
    for why, pattern in _RULES:
        if pattern.search(bare):
            return why
    return None
