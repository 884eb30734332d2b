"""Makes the engine's table of architectures (quant_core/policy/architectures.json) from one ComfyUI or several.

    python tests/comfy/make_architectures.py COMFYUI_DIR [COMFYUI_DIR ...]        the oldest first

Each is read by its own Python (COMFYUI_DIR/.venv, or the first one's): read_architectures.py builds its classes. What
differs from version to version is put together: an entry knows every variant of every version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from comfyui_quantpress.quant_core.policy.architectures import DIFFUSION_MODEL, TEXT_ENCODER, generalise

HERE = Path(__file__).parent
TABLE = HERE.parent.parent / "quant_core/policy/architectures.json"
KINDS = ("linear", "embedding", "parameter", "conv", "gate")


def read(comfyui: Path, python: Path) -> dict[str, Any]:
    """What this ComfyUI knows, as read_architectures.py writes it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.json"
        done = subprocess.run(
            [python, HERE / "read_architectures.py", comfyui, out],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            raise SystemExit(f"{comfyui}:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text("utf-8"))


def configs(name: str) -> dict[str, Any]:
    return json.loads((HERE / name).read_text("utf-8"))


def compact(kinds: Mapping[str, str]) -> dict[str, str]:
    """{pattern: kind}: with N for each number, but where two names that differ in it are of different kinds."""
    groups: dict[str, dict[str, str]] = {}
    for name, kind in kinds.items():
        groups.setdefault(generalise(name), {})[name] = kind
    patterns: dict[str, str] = {}
    for general, names in groups.items():
        if len(set(names.values())) == 1:
            patterns[general] = next(iter(names.values()))
        else:
            patterns |= _told_apart(names)
    return patterns


def _told_apart(names: Mapping[str, str]) -> dict[str, str]:
    """Patterns that keep as few numbers as tell the kinds apart, the last ones rather than the first."""
    places = next(iter(names)).split(".")
    numbers = [i for i, place in enumerate(places) if generalise(place) != place]
    for count in range(1, len(numbers) + 1):
        for kept in sorted(combinations(numbers, count), reverse=True):
            patterns: dict[str, set[str]] = {}
            for name, kind in names.items():
                patterns.setdefault(_with_numbers(name, kept), set()).add(kind)
            if all(len(found) == 1 for found in patterns.values()):
                return {pattern: found.pop() for pattern, found in patterns.items()}
    raise AssertionError(f"{names} cannot be told apart")


def _with_numbers(name: str, kept: Iterable[int]) -> str:
    return ".".join(place if i in kept else generalise(place) for i, place in enumerate(name.split(".")))


def compact_names(names: Iterable[str]) -> list[str]:
    """Patterns of the names, with N for the numbers that differ among those of one pattern."""
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        groups.setdefault(generalise(name), []).append(name.split("."))
    patterns = []
    for alike in groups.values():
        columns = list(zip(*alike, strict=True))
        patterns.append(".".join(generalise(c[0]) if len(set(c)) > 1 else c[0] for c in columns))
    return sorted(patterns)


def merged(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The parts of an entry that its variants have in common, or bring in."""
    kinds: dict[str, str] = {}
    signs: dict[str, list[str]] | None = None
    reads: set[str] = set()
    for record in records:
        for name, kind in record["kinds"].items():
            if kinds.setdefault(name, kind) != kind:
                raise SystemExit(f"{name} is {kind} in one variant and {kinds[name]} in another: make two entries.")
        reads.update(record["reads"])
        if record["signs"] is None:
            continue
        shapes = {name: "x".join(map(str, shape)) for name, shape in record["signs"].items()}
        signs = (
            {name: [shape] for name, shape in shapes.items()}
            if signs is None
            else {name: [*signs[name], shape] for name, shape in shapes.items() if name in signs}
        )
    patterns = compact(kinds)
    return {
        "signs": [" ".join([name, *dict.fromkeys(shapes)]) for name, shapes in first_of_each(signs or {})],
        "shape_read": compact_names(reads),
        **{kind: sorted(p for p, k in patterns.items() if k == kind) for kind in KINDS},
    }


def first_of_each(signs: Mapping[str, list[str]]) -> list[tuple[str, list[str]]]:
    """One of the signs that differ in numbers only, the first: it is there at every depth."""
    found: dict[str, tuple[str, list[str]]] = {}
    for name in sorted(signs, key=lambda name: [(part.zfill(4), part) for part in name.split(".")]):
        found.setdefault(generalise(name), (name, signs[name]))
    return sorted(found.values())


def published(record: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the names that published files have, where ComfyUI renames them on loading."""
    kinds = dict(record["kinds"])
    for name, kind in record["kinds"].items():
        theirs = name
        for ours, other in entry.get("published", ()):
            theirs = theirs.replace(ours, other)
        kinds[theirs] = kind
    prefix = entry.get("prefix", "")
    kinds |= dict.fromkeys(entry.get("reshaped", ()), "parameter")
    return {
        "kinds": kinds,
        "signs": {name.removeprefix(prefix): shape for name, shape in record["signs"].items()},
        "reads": [*(name.removeprefix(prefix) for name in record["reads"]), *entry.get("also_read", ())],
    }


def table(versions: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole table. versions: of read(), the oldest first."""
    return {
        "comfyui": [version["comfyui"] for version in versions],
        "architectures": [*others(), *diffusion_models(versions), *text_encoders(versions)],
    }


def others() -> list[dict[str, Any]]:
    return [{"id": name, **entry} for name, entry in configs("other_models.json").items()]


def diffusion_models(versions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries, later = [], configs("later_models.json")
    for name, entry in configs("architecture_configs.json").items():
        known = [version for version in versions if name in version["models"]]
        records = [published(record, entry) for version in known for record in version["models"][name].values()]
        if records:
            head = {"id": name, "name": entry["name"], "sort": DIFFUSION_MODEL, "comfyui": known[0]["comfyui"]}
            prefix = {"prefix": entry["prefix"]} if "prefix" in entry else {}
            records += [written(later.pop(name))] if name in later else []
            entries.append({**head, "runs_quantized": True, **prefix, **merged(records)})
    for name, entry in later.items():
        head = {"id": name, "name": entry["name"], "sort": DIFFUSION_MODEL, "comfyui": entry["comfyui"]}
        entries.append({**head, "runs_quantized": True, **merged([published(written(entry), entry)])})
    return entries


def written(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a model of a newer ComfyUI than can be read here, written down from its source by hand."""
    kinds = {name: kind for kind in KINDS for name in entry.get(kind, ())}
    return {"kinds": kinds, "signs": entry.get("signs"), "reads": entry.get("reads", [])}


def text_encoders(versions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries = []
    for name, entry in configs("text_encoder_configs.json").items():
        known = [version for version in versions if name in version["text_encoders"]]
        records = [version["text_encoders"][name] for version in known]
        if records:
            runs = {kind: runs for record in records for kind, runs in record["runs_quantized"].items()}
            head = {
                "id": name,
                "name": entry["name"],
                "sort": entry.get("sort", TEXT_ENCODER),
                "comfyui": known[0]["comfyui"],
            }
            not_as = [kind.lower() for kind, run in runs.items() if not run] if any(runs.values()) else []
            parts = {key: value for key, value in merged(map(with_head, records)).items() if key != "signs"}
            entries.append(
                {
                    **head,
                    "runs_quantized": any(runs.values()),
                    **({"not_as": not_as} if not_as else {}),
                    "marks": entry["marks"],
                    **parts,
                }
            )
    return entries


def with_head(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the output layer's name in most files; ComfyUI puts `model.` before it."""
    kinds = record["kinds"]
    return {**record, "kinds": {**kinds, "lm_head": kinds["model.lm_head"]} if "model.lm_head" in kinds else kinds}


def dumps(whole: Mapping[str, Any]) -> str:
    """JSON with a line for each pattern."""
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    folders = [Path(folder).expanduser() for folder in sys.argv[1:]]
    python = folders[0] / ".venv/bin/python"
    own = {folder: folder / ".venv/bin/python" for folder in folders}
    versions = [read(folder, own[folder] if own[folder].exists() else python) for folder in folders]
    TABLE.write_text(dumps(table(versions)), "utf-8")


if __name__ == "__main__":
    main()
