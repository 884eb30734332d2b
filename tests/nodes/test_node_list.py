"""nodes/extension.py lists every node, and every node has its page. No ComfyUI needed."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from node_list import ROOT, listed_nodes, node_id  # noqa: E402 (a neighbour, found by the line above)

PAGES = ROOT / "web/docs"


def test_every_file_beside_the_list_is_in_it_once():
    files = {path.stem for path in (ROOT / "nodes").glob("*.py")} - {"__init__", "extension"}
    assert sorted(listed_nodes()) == sorted(files)


@pytest.mark.parametrize("name", listed_nodes())
def test_every_node_has_its_page(name):
    page = PAGES / f"{node_id(name)}.md"
    assert page.is_file(), f"nodes/{name}.py has no page: write web/docs/{page.name}"
    assert "## Example" in page.read_text("utf-8")


def test_every_page_is_of_one_node():
    assert sorted(path.stem for path in PAGES.glob("*.md")) == sorted(map(node_id, listed_nodes()))
