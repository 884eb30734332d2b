"""The rules of the house: who may import whom, what a wheel holds, and that there is one copy of every module.

The rules are in `violations`, and every one of them is shown to fail on a bad snippet first.
"""

import ast
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import comfyui_quantpress
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

sys.path.append(str(Path(__file__).parent))  # last: tests/comfy must hide nobody's comfy
from import_graph import Import, circles, graph, imports_in_functions, pack_imports, upward  # noqa: E402  the line above

ROOT = Path(__file__).resolve().parent.parent
PACK = "comfyui_quantpress"
TOP_PACKAGES = ("quant_core", "layouts", "nodes", "cli", "demo")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]

QUANT_CORE_MAY_IMPORT = (sys.stdlib_module_names - {"argparse"}) | {
    "torch",
    "safetensors",
    "numpy",
    "comfy_kitchen",
    "greenlet",
    "triton",  # triton: optional, imported where a CUDA tensor needs it
}
LAYOUTS_MAY_NOT_IMPORT = {"nodes", "cli", "demo"}
MAY_NOT_PRINT = {"quant_core", "layouts", "nodes"}
MAY_NAME_NO_FLAG = {"quant_core", "layouts", "nodes"}
FLAG = re.compile(r"(?<![\w-])--[a-z]")


# --- the checker ---------------------------------------------------------------------------------------------------


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, bool, str, tuple[str, ...]]]:
    """Yield (line, relative?, text, dotted parts) of every import in a module of `package`, wherever it stands.

    package: folders below the root, () for the root itself. The parts of a relative import count from the root;
    one that climbs out of the root gives ("..",).
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, False, alias.name, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if not node.level:
                yield node.lineno, False, node.module, module
                continue
            climbs = node.level - 1
            base = package[: len(package) - climbs] if climbs <= len(package) else ("..",)
            for alias in node.names:
                yield (
                    node.lineno,
                    True,
                    "." * node.level + ".".join((*module, alias.name)),
                    (*base, *module, alias.name),
                )
        elif isinstance(node, ast.Call) and node.args and _called_name(node) in {"import_module", "__import__"}:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and not name.value.startswith("."):
                yield node.lineno, False, name.value, tuple(name.value.split("."))


def _called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def docstrings(tree: ast.AST) -> set[ast.Constant]:
    """The strings that nobody is shown: of modules, classes and functions."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    firsts = [body[0].value for body in bodies if body and isinstance(body[0], ast.Expr)]
    return {value for value in firsts if isinstance(value, ast.Constant)}


def violations(source: str, path: str) -> list[str]:
    """Every broken house rule in the module at `path` (relative to the root, with slashes), one sentence each."""
    tree = ast.parse(source)
    package = tuple(path.split("/")[:-1])
    home = package[0] if package else ""
    found = []
    for line, relative, text, parts in imports(tree, package):
        where = f"{path}:{line}: imports {text}"
        if parts[0] == ".." or (not relative and parts[0] == PACK):
            found.append(f"{where}: inside the pack every import is relative, and stays in the pack")
        elif home == "quant_core" and relative and parts[0] != "quant_core":
            found.append(f"{where}: quant_core imports nothing above itself")
        elif home == "quant_core" and not relative and parts[0] not in QUANT_CORE_MAY_IMPORT:
            found.append(f"{where}: not on quant_core's allow-list")
        elif home == "layouts" and parts[0] in LAYOUTS_MAY_NOT_IMPORT:
            found.append(f"{where}: layouts never points back")
    if home in MAY_NOT_PRINT:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(f"{path}:{node.lineno}: print() in {home}: use logging, or a report")
    if home in MAY_NAME_NO_FLAG:
        told = docstrings(tree)
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and node not in told else None
            if isinstance(text, str) and FLAG.search(text):
                found.append(f"{path}:{node.lineno}: a flag in {home}: errors carry the setting, see errors.py")
    return found


BAD = [
    ("quant_core/run.py", "import comfy.ops"),
    ("quant_core/run.py", "import torch, folder_paths"),
    ("quant_core/run.py", "def f():\n    import argparse"),
    ("quant_core/run.py", "from rich.progress import Progress"),
    ("quant_core/run.py", "import layouts"),
    ("quant_core/run.py", "from .. import layouts"),
    ("quant_core/run.py", "from ..nodes.load import Load"),
    ("quant_core/run.py", "from .. import WEB_DIRECTORY"),
    ("quant_core/fit/loop.py", "from ...cli import main"),
    ("quant_core/fit/loop.py", "from .... import outside"),
    ("quant_core/run.py", "import importlib\nimportlib.import_module('comfy.utils')"),
    ("quant_core/run.py", "__import__('comfy')"),
    ("quant_core/run.py", "import comfyui_quantpress.quant_core.plan"),
    ("nodes/load.py", "from comfyui_quantpress import quant_core"),
    ("cli/main.py", "from comfyui_quantpress.quant_core import run"),
    ("__init__.py", "from comfyui_quantpress import layouts"),
    ("__init__.py", "from .. import outside"),
    ("layouts/nf4.py", "from ..nodes import load"),
    ("layouts/nf4.py", "from .. import cli"),
    ("layouts/kernels/nf4.py", "from ...demo.picture import draw"),
    ("layouts/nf4.py", "import nodes"),
    ("quant_core/run.py", "print('done')"),
    ("layouts/nf4.py", "def f(x):\n    print(x)"),
    ("nodes/load.py", "if True: print()"),
    ("quant_core/run.py", "text = f'{path} exists. Use --overwrite.'"),
    ("layouts/nf4.py", "def f():\n    raise ValueError('--device cuda: there is none')"),
    ("nodes/load.py", "TOOLTIP = 'as `quantpress repair --assume nvfp4` does'"),
]
GOOD = [
    (
        "quant_core/run.py",
        "import json, torch\nfrom safetensors.torch import save\nimport comfy_kitchen as ck\nimport numpy",
    ),
    ("quant_core/run.py", "from . import plan\nfrom .formats import registry\nfrom .fit.loop import fit"),
    ("quant_core/fit/loop.py", "from .. import format\nfrom ..format import Format\nfrom ...quant_core import plan"),
    ("quant_core/run.py", "def f(printer):\n    printer.print('x')"),
    ("layouts/nf4.py", "import comfy.ops, torch\nfrom ..quant_core import format\nfrom .kernels import nf4"),
    ("nodes/load.py", "import folder_paths\nfrom ..layouts import nf4\nfrom ..quant_core import plan"),
    ("cli/main.py", "import argparse\nimport rich\nfrom ..quant_core import plan\nprint('x')"),
    ("cli/main.py", "parser.add_argument('--overwrite')"),
    ("quant_core/run.py", 'def f():\n    """w --prepare--> work"""\n    return "a -- b"'),
    ("__init__.py", "from .nodes import QuantPressExtension"),
]


@pytest.mark.parametrize(("path", "source"), BAD)
def test_checker_finds_exactly_the_one_fault(path, source):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_checker_lets_good_code_pass(path, source):
    assert violations(source, path) == []


# --- the pack obeys ------------------------------------------------------------------------------------------------


def pack_modules() -> list[str]:
    found = [ROOT / "__init__.py"]
    for top in TOP_PACKAGES:
        found += (ROOT / top).rglob("*.py")
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@pytest.mark.parametrize("path", pack_modules())
def test_module_keeps_the_house_rules(path):
    assert violations((ROOT / path).read_text(encoding="utf-8"), path) == []


def run_python(code: str, cwd: Path) -> str:
    """Standard output of `code` in a fresh interpreter; fails with its standard error."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BLOCK_COMFYUI = """
import sys
for name in ("comfy", "comfy_api", "folder_paths", "nodes"):
    sys.modules[name] = None
"""


def test_the_block_on_comfyui_blocks(tmp_path):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "ops.py").write_text("")
    assert run_python("import comfy.ops; print('found')", tmp_path) == "found"
    with pytest.raises(AssertionError, match="ModuleNotFoundError: .*comfy"):
        run_python(BLOCK_COMFYUI + "import comfy.ops", tmp_path)


def test_all_of_quant_core_imports_without_comfyui(tmp_path):
    code = """
    import importlib, pkgutil
    import comfyui_quantpress.quant_core as core
    names = [module.name for module in pkgutil.walk_packages(core.__path__, core.__name__ + ".")]
    for name in names:
        importlib.import_module(name)
    print(len(names))
    """
    on_disk = len(list((ROOT / "quant_core").rglob("*.py"))) - 1  # less quant_core/__init__.py
    assert int(run_python(BLOCK_COMFYUI + textwrap.dedent(code), tmp_path)) == on_disk


# --- the order of the rooms ----------------------------------------------------------------------------------------


def an_import(source: str, target: str) -> Import:
    return Import(source, target, 1, "")


def test_an_import_of_a_room_above_is_found():
    assert upward([an_import("quant_core.tools.edit", "quant_core.formats.base")]) == []
    assert upward([an_import("quant_core.formats.nvfp4", "quant_core.formats.families.padded")]) == []
    (found,) = upward([an_import("quant_core.formats.base", "quant_core.tools.edit")])
    assert "quant_core.formats.base:1 imports quant_core.tools.edit" in found
    (found,) = upward([an_import("quant_core.errors", "quant_core.numerics.scales")])
    assert "quant_core/numerics stands above quant_core" in found


def test_a_circle_is_found():
    arrows = graph([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")])
    assert circles(arrows) == [["a", "b", "c"]]


def test_rooms_import_downwards_only():
    assert upward(pack_imports()) == []


def test_no_modules_import_each_other_in_a_circle():
    """An import inside a function, or for types only, counts too."""
    assert circles(graph((edge.source, edge.target) for edge in pack_imports())) == []


# Imports inside functions, counted: they may only become fewer, and each kind has a reason.
#   cli: a command loads torch and the engine when it runs, so that `quantpress --help` answers at once.
#   layouts, nodes, the root: parts of ComfyUI and comfy-kitchen exist only where ComfyUI runs, some only in newer.
#   kernels, search, feedback: Triton exists on few machines, and its kernels load with the first CUDA tensor.
#   lockstep: greenlet is needed for one way of quantizing only.
IMPORTS_IN_FUNCTIONS = {
    "__init__.py": 2,
    "cli": 93,
    "layouts/__init__.py": 1,
    "layouts/comfyui.py": 8,
    "layouts/comfyui_audit.py": 2,
    "layouts/comfyui_formats.py": 3,
    "layouts/comfyui_notes.py": 3,
    "layouts/comfyui_patches.py": 5,
    "layouts/kernels/activation.py": 2,
    "layouts/kernels/decode.py": 2,
    "layouts/kernels/scaled_dot.py": 2,
    "layouts/kernels/weight_only.py": 4,
    "nodes/extension.py": 2,
    "nodes/shared/detection.py": 3,
    "nodes/shared/load_model.py": 7,
    "nodes/shared/progress.py": 1,
    "nodes/shared/recipe.py": 2,
    "quant_core/algorithms/choosers/search.py": 1,
    "quant_core/algorithms/rounders/feedback.py": 1,
    "quant_core/pipeline/in_order/lockstep.py": 1,
}


def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def test_imports_inside_functions_become_no_more():
    counts: Counter[str] = Counter()
    for path in pack_modules():
        counts["cli" if path.startswith("cli/") else path] += imports_in_functions(parsed(path))
    assert {path: count for path, count in counts.items() if count} == IMPORTS_IN_FUNCTIONS


# --- short functions -----------------------------------------------------------------------------------------------

LONGEST = 50  # lines, the signature and the docstring among them
# A list of a node's inputs with their tooltips is long and has no steps; a kernel's body is one loop on the chip.
MAY_BE_LONG = ("define_schema", "widgets", "scaled_dot_kernel", "_round_block")


def long_functions(path: str) -> list[str]:
    return [
        f"{path}:{node.lineno}: {node.name} has {lines} lines"
        for node in ast.walk(parsed(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in MAY_BE_LONG
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST
    ]


@pytest.mark.parametrize("path", pack_modules())
def test_functions_are_short(path):
    assert long_functions(path) == []


def test_the_exceptions_are_needed():
    """Of each name that may be long, one function is."""
    names = {
        node.name
        for path in pack_modules()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or node.lineno) - node.lineno + 1 > LONGEST
    }
    assert set(MAY_BE_LONG) <= names


# --- the root, as ComfyUI and as pip see it ------------------------------------------------------------------------


def test_root_import_without_comfyui_is_cheap(tmp_path):
    code = """
    import sys, comfyui_quantpress
    print(sorted({"torch", "numpy", "triton", "rich"} & sys.modules.keys()))
    """
    assert run_python(code, tmp_path) == "[]"


def test_root_loads_by_path_under_comfyuis_odd_name(tmp_path):
    """As ComfyUI's nodes.load_custom_node does it; the entry point raises only when it is called without comfy_api."""
    code = f"""
    import asyncio, importlib.util, sys
    name = {str(ROOT)!r}.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, {str(ROOT / "__init__.py")!r})
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    assert sorted(module.__all__) == ["WEB_DIRECTORY", "comfy_entrypoint"]
    assert "comfyui_quantpress" not in sys.modules
    try:
        asyncio.run(module.comfy_entrypoint())
    except ModuleNotFoundError:
        print("raised when called")
    """
    assert run_python(BLOCK_COMFYUI + textwrap.dedent(code), tmp_path) == "raised when called"


def test_a_folder_called_comfy_is_not_taken_for_comfyui(tmp_path):
    (tmp_path / "comfy").mkdir()
    assert run_python("import comfyui_quantpress; print(comfyui_quantpress._inside_comfyui())", tmp_path) == "False"


def test_tests_use_the_installed_pack_of_this_checkout():
    assert Path(comfyui_quantpress.__file__).resolve() == ROOT / "__init__.py"


def second_copies(modules: dict[str, object]) -> list[str]:
    """Names of modules loaded from the pack's files under another name than comfyui_quantpress."""
    own = {ROOT / "__init__.py", *(ROOT / path for path in pack_modules())}
    files = {name: getattr(module, "__file__", None) for name, module in list(modules.items())}
    return [
        name for name, file in files.items() if file and name.partition(".")[0] != PACK and Path(file).resolve() in own
    ]


def test_no_second_copy_of_the_pack_is_loaded():
    """A second copy is a second set of classes, and that alone breaks tensor dispatch. pytest can make one."""
    assert second_copies({"main": comfyui_quantpress}) == ["main"]
    assert second_copies(sys.modules) == []


# --- what is shipped -----------------------------------------------------------------------------------------------


def test_versions_agree():
    from comfyui_quantpress.quant_core._version import __version__

    assert __version__ == PYPROJECT["project"]["version"]


def package_name(folder: Path) -> str:
    return ".".join((PACK, *folder.relative_to(ROOT).parts))


def test_every_package_folder_is_listed_in_pyproject():
    """An unlisted folder is missing from the wheel; a listed one that does not exist breaks the build."""
    folders = {(ROOT / path).parent for path in pack_modules() if path.endswith("__init__.py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(map(package_name, folders))


def test_every_folder_with_modules_is_a_package():
    folders = {(ROOT / path).parent for path in pack_modules()}
    assert sorted(str(folder) for folder in folders if not (folder / "__init__.py").exists()) == []


def test_no_module_lies_outside_the_packages():
    """A loose module in the root would go into the wheel; a new top folder would escape every check here."""
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]
    tops = {path.parent.name for path in ROOT.glob("[!.]*/__init__.py")}
    assert tops <= set(TOP_PACKAGES)


def test_package_data_covers_every_data_file():
    """What the front end, the demo and the engine read at run time must be there after `pip install .` too."""
    shipped = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        base = ROOT.joinpath(*package.split(".")[1:])
        shipped |= {path for pattern in patterns for path in base.glob(pattern)}
    data = set()
    for top in (*TOP_PACKAGES, "web", "example_workflows", "locales", "assets"):
        data |= {path for path in (ROOT / top).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    data = {path for path in data if path.suffix != ".py"}
    assert sorted(str(path) for path in data - shipped) == []


def requirement_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement).group().lower()


def test_requirements_txt_cannot_change_what_comfyui_chose():
    """ComfyUI's manager installs it into the user's ComfyUI.

    So: bare names only, and nothing of which ComfyUI itself pins a build.
    """
    lines = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+", line)] == []
    assert {"torch", "torchvision", "triton", "comfy-kitchen"}.isdisjoint(lines)
    assert set(lines) == {requirement_name(r) for r in PYPROJECT["project"]["dependencies"]} - {"comfy-kitchen"}


def test_torch_and_triton_stand_only_in_their_extras():
    project = PYPROJECT["project"]
    named = {"project": project["dependencies"], **project["optional-dependencies"]}
    holders = {key for key, reqs in named.items() if {"torch", "triton"} & {requirement_name(r) for r in reqs}}
    assert holders == {"torch", "triton"}
