"""The list in nodes/extension.py, read without ComfyUI."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def listed_nodes() -> list[str]:
    """The names of the nodes' files, in the order of the list."""
    tree = ast.parse((ROOT / "nodes/extension.py").read_text("utf-8"))
    (listed,) = (
        ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign) and [ast.unparse(target) for target in statement.targets] == ["NODES"]
    )
    return list(listed)


def node_id(name: str) -> str:
    """The id in the schema of the node in this file."""
    (found,) = re.findall(r'node_id="(\w+)"', (ROOT / f"nodes/{name}.py").read_text("utf-8"))
    return found
