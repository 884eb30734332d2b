"""What a conversion is asked to do.

The command line and the nodes each build a Request. What does not fit together is refused here, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..calibration.use import CalibrationUse
from ..checkpoint.same_file import require_not_source
from ..checkpoint.suffixes import SUFFIX
from ..errors import OutputError, Remedy, RequestError
from ..policy.general import Policy
from ..policy.presets import PRESETS, keep_patterns
from ..policy.recipe import Recipe

_DEVICE = re.compile(r"cpu|(?P<cuda>cuda)(:(?P<index>\d+))?")


@dataclass(frozen=True, slots=True)
class Request:
    """One conversion, checked when it is made. RequestError: what it asks for does not fit together.

    source: a file, an index or a folder. target: the new file. device: "auto", "cpu", "cuda", "cuda:1".
    calibration: what is known of the layers' inputs. residual_lora: the file for the low-rank part that the recipe's
    residual_rank asks for. overwrite: an existing target is replaced.
    allow_nonfinite: a layer with NaN or Inf keeps its source dtype; by default it is an InputFileError.
    never_pack: layers whose weight must keep its stored shape, because a loader reads it. They take the policy's
    fallback, or stay. preset: of PRESETS; keeps what older converters keep for this family of models.
    other_runtime: also what ComfyUI does not run quantized, or would not find.
    in_order: layers are quantized in order of execution, beside the running model.
    """

    source: Path
    target: Path
    recipe: Recipe
    policy: Policy = Policy()
    device: str | torch.device = "auto"
    calibration: CalibrationUse | None = None
    residual_lora: Path | None = None
    overwrite: bool = False
    allow_nonfinite: bool = False
    never_pack: frozenset[str] = frozenset()
    other_runtime: bool = False
    preset: str | None = None
    in_order: bool = False

    def __post_init__(self) -> None:
        if self.in_order and self.calibration is None:
            raise RequestError(
                "quantizing in order needs the calibration too: give the one that was captured from this model, or "
                "leave the model out."
            )
        if any(recipe.residual.rank for recipe in self.recipes) != (self.residual_lora is not None):
            raise RequestError(
                "needs both a rank and a file to go to: a residual_rank above 0, and the file's name.", "residual_lora"
            )

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """All that a layer may get: the main one, the fallback, the rules'."""
        others = (self.policy.fallback, *(rule.recipe for rule in self.policy.rules))
        return (self.recipe, *(recipe for recipe in others if recipe is not None))

    def policy_for(self, layers: Sequence[str]) -> Policy:
        """The policy, with the preset as patterns that keep some of these layers. RequestError: it keeps none."""
        if self.preset is None or not PRESETS[self.preset].keep:
            return self.policy
        patterns = keep_patterns((self.preset,), layers)
        if not patterns:
            raise RequestError(
                f"{self.preset} names none of this model's layers: it is for models of another family. "
                "Choose none, or the family of this model.",
                "preset",
            )
        return replace(self.policy, keep=tuple(dict.fromkeys((*self.policy.keep, *patterns))))

    def check_residual_file(self, reads: Sequence[Path]) -> None:
        """OutputError when the low-rank part cannot go where it is asked to. reads: files it must not replace."""
        path = self.residual_lora
        if path is None:
            return
        if path.suffix.lower() != SUFFIX or path.resolve() == self.target.resolve() or not path.parent.is_dir():
            raise OutputError(
                f"{path} needs a .safetensors name of its own, in a folder that exists.", "residual_lora"
            )
        require_not_source(path, reads)
        if path.exists() and not self.overwrite:
            raise OutputError(f"{path}: the file exists. Choose another name.", "overwrite", Remedy.REPLACE)


def leaves_all_biases(recipe: Recipe) -> bool:
    """Whether every layer gets a low-rank part, beside which a bias is never corrected.

    Both would give the mean error back, and measured, that is too much.
    """
    part = recipe.residual
    return part.rank > 0 and not part.target and not part.depth


def pick_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one. RequestError for a device that this machine lacks."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = _DEVICE.fullmatch(str(device))
    if found is None:
        raise RequestError(f"{device}: there is no such device. Choose auto, cpu, cuda or cuda:1.", "device")
    if found["cuda"] and not torch.cuda.is_available():
        raise RequestError(
            f"{device}: this torch sees no CUDA device. Choose cpu, or install a CUDA build of torch.", "device"
        )
    if found["index"] and int(found["index"]) >= torch.cuda.device_count():
        raise RequestError(
            f"{device}: this torch sees {torch.cuda.device_count()} CUDA devices, numbered from 0.", "device"
        )
    return torch.device(device)
