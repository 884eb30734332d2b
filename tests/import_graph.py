"""Who imports whom in the pack, read from the sources.

`python -m tests.import_graph` prints the rooms, floors, arrows and circles. tests/test_house.py holds them to the
order of the house. A room is a folder with modules. Every import counts, also one inside a function and one for types
only: a circle through those is a circle for whoever reads.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOP_PACKAGES = ("quant_core", "layouts", "nodes", "cli", "demo")

Graph = Mapping[str, set[str]]
# The rooms from the cellar up. A room imports from those before it; a room of a room counts as its own where it is
# named here, else as part of the one around it.
ORDER = (
    "quant_core",
    "quant_core/numerics",
    "quant_core/checkpoint",
    "quant_core/names",
    "quant_core/formats",
    "quant_core/stored",
    "quant_core/algorithms",
    "quant_core/policy",
    "quant_core/calibration",
    "quant_core/input_scales",
    "quant_core/pipeline",
    "quant_core/tools",
    "layouts/kernels",
    "layouts",
    "demo",
    "nodes/shared",
    "nodes/jobs",
    "nodes",
    "cli/shared",
    "cli/commands",
    "cli/compat",
    "cli",
)


@dataclass(frozen=True)
class Import:
    """One import of a module of the pack. where: the function it stands in, "" at the top of the module."""

    source: str
    target: str
    line: int
    where: str


def module_paths(root: Path = ROOT) -> list[Path]:
    return sorted(path for top in TOP_PACKAGES for path in (root / top).rglob("*.py"))


def module_name(path: Path, root: Path = ROOT) -> str:
    """quant_core.formats for quant_core/formats/__init__.py."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def pack_imports(root: Path = ROOT) -> list[Import]:
    """Every relative import between modules of the pack, by file and line."""
    paths = module_paths(root)
    known = {module_name(path, root) for path in paths}
    found = []
    for path in paths:
        package = path.parent.relative_to(root).parts
        for node, where in relative_imports(ast.parse(path.read_text(encoding="utf-8"))):
            base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            for alias in node.names:
                target = _module_of((*base, alias.name), known)
                if target is not None and target != module_name(path, root):
                    found.append(Import(module_name(path, root), target, node.lineno, where))
    return found


def relative_imports(tree: ast.AST, where: str = "") -> Iterator[tuple[ast.ImportFrom, str]]:
    """Every `from .x import y`, with the name of the function around it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node, where
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield from relative_imports(node, node.name if inside else where)


def _module_of(parts: Iterable[str], known: set[str]) -> str | None:
    """`from .a import b` means the module a.b where there is one, else b of the module a."""
    names = [part for part in parts if part]
    for length in (len(names), len(names) - 1):
        if ".".join(names[:length]) in known:
            return ".".join(names[:length])
    return None


def room_of(module: str, root: Path = ROOT) -> str:
    """quant_core/formats for quant_core.formats.base and for quant_core.formats."""
    path = root.joinpath(*module.split("."))
    return (path if path.is_dir() else path.parent).relative_to(root).as_posix()


def place_of(module: str) -> int:
    """Its room's place in ORDER."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        room = "/".join(parts[:length])
        if room in ORDER:
            return ORDER.index(room)
    raise ValueError(f"{module} lies in no room of ORDER")


def upward(imports: Iterable[Import]) -> list[str]:
    """Every import of a room that stands above, one sentence each."""
    return [
        f"{edge.source}:{edge.line} imports {edge.target}: {ORDER[place_of(edge.target)]} stands above "
        f"{ORDER[place_of(edge.source)]} in ORDER"
        for edge in imports
        if place_of(edge.target) > place_of(edge.source)
    ]


def imports_in_functions(tree: ast.AST, inside: bool = False) -> int:
    """How many import statements stand in functions, of the pack's modules and of others."""
    count = 0
    for node in ast.iter_child_nodes(tree):
        count += inside and isinstance(node, (ast.Import, ast.ImportFrom))
        count += imports_in_functions(node, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return count


def graph(edges: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for source, target in edges:
        found.setdefault(source, set())
        found.setdefault(target, set())
        if source != target:
            found[source].add(target)
    return found


def circles(arrows: Graph) -> list[list[str]]:
    """Groups of two or more that reach each other, each sorted."""
    reach = {start: _reached(arrows, start) for start in arrows}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in arrows if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def _reached(arrows: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(arrows[start])
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += arrows[node]
    return seen


def floors(arrows: Graph) -> int:
    """How many rooms the longest way down passes; rooms of one circle stand on one floor."""
    reach = {start: _reached(arrows, start) for start in arrows}
    depth: dict[str, int] = {}
    for node in sorted(arrows, key=lambda name: len(reach[name] | {name})):
        below = [depth[other] for other in arrows[node] if node not in reach[other]]
        depth[node] = 1 + max(below, default=0)
    return max(depth.values(), default=0)


def main() -> None:
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    found = pack_imports(root)
    modules = graph((edge.source, edge.target) for edge in found)
    for top in ("", "quant_core"):
        inside = [edge for edge in found if edge.source.startswith(top) and edge.target.startswith(top)]
        rooms = graph((room_of(edge.source, root), room_of(edge.target, root)) for edge in inside)
        row = {
            "of": top or "the pack",
            "modules": sum(name.startswith(top) for name in modules),
            "rooms": len(rooms),
            "floors": floors(rooms),
            "arrows": sum(len(targets) for targets in rooms.values()),
            "circles of rooms": circles(rooms),
            "circles of modules": circles(
                {name: targets for name, targets in modules.items() if name.startswith(top)}
            ),
            "imports in functions": sum(bool(edge.where) for edge in inside),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
