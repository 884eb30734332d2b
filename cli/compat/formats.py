"""Which formats the older tool's options ask for, in our words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...quant_core.errors import RequestError
from ...quant_core.policy.presets import AVOID, PRESETS

_FLAGS = ("nvfp4", "mxfp8", "nf4", "fp4", "af4", "int8")
_NAMES = {"nvfp4": "nvfp4", "mxfp8": "mxfp8", "nf4": "bnb_nf4", "fp4": "bnb_fp4", "af4": "bnb_af4"}
_BY_MODE = {
    "fp8": {
        "tensor": "float8_e4m3fn",
        "row": "float8_e4m3fn_rowwise",
        "block": "float8_e4m3fn_blockwise",
        "block3d": "float8_e4m3fn_block3d",
    },
    "int8": {
        "tensor": "int8_tensorwise",
        "row": "int8_rowwise",
        "block": "int8_blockwise",
        "block3d": "int8_blockwise",
    },
}
_GROUPED = (
    "float8_e4m3fn_blockwise",
    "float8_e4m3fn_block3d",
    "int8_blockwise",
    "int8_lodewise",
    "bnb_nf4",
    "bnb_fp4",
    "bnb_af4",
)


class Given:
    """The options that were given. What is taken counts as used; what is left over had no effect."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._taken: set[str] = set()
        self.notes: list[str] = []

    def take(self, dest: str) -> Any:
        """None when it was not given."""
        self._taken.add(dest)
        return self._options.get(dest)

    def value(self, dest: str) -> Any:
        """As take, but it does not count as used."""
        return self._options.get(dest)

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def left(self) -> list[str]:
        return [dest for dest in self._options if dest not in self._taken and dest != "overwrite"]

    def input_scale(self) -> str | None:
        """What --input_scale and the text filters ask for: "unit" or "weight"."""
        if any(PRESETS[name].text_encoder and self.value(name) for name in PRESETS):
            self.take("input_scale")
            return "weight"
        return "unit" if self.take("input_scale") else None


class Formats:
    """The main format, and those of custom, excluded and fallback layers."""

    def __init__(self, given: Given) -> None:
        self._given = given
        kinds = [flag for flag in _FLAGS if given.take(flag)]
        if len(kinds) > 1:
            raise RequestError(
                f"{' and '.join('--' + kind for kind in kinds)} cannot be used together. Give one format, and "
                "--custom-type for single layers."
            )
        self._kind = kinds[0] if kinds else "fp8"
        self._mode, self._size = given.take("scaling_mode"), given.take("block_size")
        self._backend = given.take("kernel_backend")
        self._convrot, self._group = given.take("convrot"), given.take("convrot_group_size")
        self._name = self._format(self._kind, self._mode, bool(self._convrot), "")

    @property
    def fp8(self) -> bool:
        return self._name.startswith("float8")

    def main(self) -> list[str]:
        words = ["--format", self._name]
        if self._size is not None and self._name in _GROUPED:
            words += ["--group-size", str(self._size)]
        elif self._size is not None:
            self._given.note(f"--block_size {self._size}: {self._name} has no choice of block.")
        if self._name == "int8_convrot" and self._group is not None:
            words += ["--rotation", str(self._group)]
        return words

    def auto_suffix(self, simple: bool) -> str:
        """As the older tool names its files."""
        mixed = "mixed" if self._given.value("custom_layers") or self._given.value("fallback") else ""
        scaling = f"_{self._mode or 'tensor'}" if self._kind in ("fp8", "int8") else ""
        return f"_{'simple' if simple else 'learned'}_{self._kind}{mixed}{scaling}"

    def choices(self, layers: list[str]) -> list[str]:
        """Custom, excluded and filtered layers, as rules and patterns to keep."""
        given, words = self._given, []
        full_match = bool(given.take("fullmatch"))
        custom, excluded = given.take("custom_layers"), given.take("exclude_layers")
        if custom is not None:
            words += ["--rule", f"{_whole(custom, full_match)}={self._custom()}"]
        fallback = self._fallback()
        if excluded is not None:
            words += ["--rule", f"{_whole(excluded, full_match)}={fallback or 'keep'}"]
        for pattern in self._filtered(layers):
            words += ["--rule", f"{pattern}={fallback}"] if fallback else ["--keep", pattern]
        if fallback:
            words += ["--fallback", fallback.partition(",")[0].partition(":")[0]]
        return words

    def _format(self, kind: str, mode: str | None, convrot: bool, what: str) -> str:
        """Our name of a kind and scaling mode. what: the prefix of the options, for the notes."""
        if kind in _NAMES:
            if mode is not None:
                self._given.note(f"--{what}scaling_mode {mode}: {_NAMES[kind]} has one kind of scales.")
            return _NAMES[kind]
        if kind == "int8" and self._backend == "lodewise":
            return "int8_lodewise"
        if kind == "int8" and mode is None and (self._backend or self._size) and not convrot:
            self._given.note(
                f"--int8 with {'--kernel_backend' if self._backend else '--block_size'} and no --scaling_mode: taken "
                "as block scales, as older versions had it; 1.3.1 ignored the size."
            )
            mode = "block"
        mode = "block" if mode == "block2d" else mode or "tensor"
        if mode == "block3d" and kind == "fp8":
            self._given.note(
                f"--{what}scaling_mode block3d: one scale per row and block; version 1.3.1 wrote 2-D blocks instead."
            )
        if convrot and (kind, mode) == ("int8", "row"):
            return "int8_convrot"
        if convrot:
            self._given.note(f"--{what}convrot: only int8 with row scales is rotated.")
        return _BY_MODE[kind][mode]

    def _custom(self) -> str:
        given = self._given
        kind = given.take("custom_type") or self._kind
        mode = given.take("custom_scaling_mode") or (self._mode if kind in _BY_MODE else None)
        name = self._format(kind, mode, bool(given.take("custom_convrot")), "custom-")
        wish = self._sized(name, given.take("custom_block_size") or self._size)
        wish += ",nearest" if given.take("custom_simple") else ""
        return wish + (",full-precision" if given.take("custom_full_precision_mm") else "")

    def _fallback(self) -> str | None:
        given = self._given
        kind = given.take("fallback")
        if kind is None:
            return None
        name = self._format(kind, self._mode if kind in _BY_MODE else None, False, "fallback-")
        wish = self._sized(name, given.take("fallback_block_size") or self._size)
        return wish + (",nearest" if given.take("fallback_simple") else "")

    @staticmethod
    def _sized(name: str, size: int | None) -> str:
        return f"{name}:{size}" if size is not None and name in _GROUPED else name

    def _filtered(self, layers: list[str]) -> list[str]:
        """Parts of names that the filters keep, where they occur in the model."""
        names = [name for name in PRESETS if self._given.take(name)]
        parts = {part for name in names for part in PRESETS[name].keep}
        if self._kind in ("nvfp4", "mxfp8"):
            parts.update(AVOID)
        found = sorted(part for part in parts if any(part in layer for layer in layers))
        silent = [name for name in names if not any(part in layer for part in PRESETS[name].keep for layer in layers)]
        if silent and layers:
            self._given.note(
                f"{', '.join('--' + name for name in silent)}: no layer of this model has a name that the filter "
                "keeps."
            )
        return [re.escape(part) for part in found]


def _whole(pattern: str, full_match: bool) -> str:
    return f"^(?:{pattern})$" if full_match else pattern
