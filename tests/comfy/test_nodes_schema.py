"""What every node promises its user, checked on the list that a running ComfyUI serves; the example workflows run."""

import ast
import json
import sys
import urllib.request
from pathlib import Path

import pytest
from comfy_server import ROOT, Graph

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nodes"))
from node_list import listed_nodes, node_id  # noqa: E402 (of another folder, found by the line above)

# Only ever longer. Every other test here asks the nodes that are served.
IDS = (
    "QuantPressLoadSource",
    "QuantPressModelSource",
    "QuantPressQuantize",
    "QuantPressLoadQuantized",
    "QuantPressSave",
    "QuantPressLoadFile",
    "QuantPressInspect",
    "QuantPressTestConditioning",
    "QuantPressCapture",
    "QuantPressCollect",
    "QuantPressSaveCalibration",
    "QuantPressLoadCalibration",
    "QuantPressOpenFile",
    "QuantPressRepair",
    "QuantPressMigrate",
    "QuantPressEditMetadata",
    "QuantPressInputScales",
    "QuantPressRequantize",
    "QuantPressDequantize",
    "QuantPressBitsandbytes",
    "QuantPressBakeLora",
    "QuantPressExtractModel",
    "QuantPressReplaceModel",
    "QuantPressSplitShards",
    "QuantPressSaveSource",
)
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
CONTROL = {"fixed", "randomize", "increment", "decrement"}


@pytest.fixture(scope="module")
def info(server):
    return {name: node for name, node in server.call("/object_info").items() if name.startswith("QuantPress")}


def test_the_ids_that_saved_workflows_hold_are_served(info):
    assert set(IDS) <= set(info)


def test_every_listed_node_is_served(info):
    assert list(info) == [node_id(name) for name in listed_nodes()]


def test_every_node_says_what_it_does_and_every_input_its_trade_off(info):
    for name, node in info.items():
        assert node["category"].startswith("QuantPress") and len(node["description"]) > 40, name
        for group in ("required", "optional"):
            for key, spec in node["input"].get(group, {}).items():
                assert len(spec[1].get("tooltip", "")) > 30 or spec[0].startswith("QUANTPRESS"), (name, key)
        assert all(node.get("output_tooltips") or [True]), name


def test_the_recipe_offers_every_format_chooser_and_rounder(info):
    from comfyui_quantpress.quant_core.algorithms.choosers import CHOOSERS
    from comfyui_quantpress.quant_core.algorithms.rounders import ROUNDERS
    from comfyui_quantpress.quant_core.formats import all_formats

    inputs = info["QuantPressQuantize"]["input"]["required"]
    assert inputs["format"][1]["options"] == [fmt.name for fmt in all_formats()]
    assert inputs["scales"][1]["options"] == ["auto", *CHOOSERS] and inputs["rounding"][1]["options"] == [
        "auto",
        *ROUNDERS,
    ]
    offered = {str(size) for fmt in all_formats() for size in fmt.group_sizes}
    assert offered < set(inputs["group_size"][1]["options"])


def test_every_node_has_its_page(server, info):
    for name in info:
        with urllib.request.urlopen(f"{server.url}/extensions/ComfyUI-QuantPress/docs/{name}.md", timeout=30) as page:
            text = page.read().decode()
        assert text.startswith("# " + info[name]["display_name"]) and "## Example" in text, name
        inputs = info[name]["input"]
        assert all(f"**{key}**" in text for key in (*inputs["required"], *inputs.get("optional", ()))), name


def test_every_execute_is_short():
    for path in (ROOT / "nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "execute":
                assert node.end_lineno - node.lineno < 25, path.name


def api_graph(workflow: dict) -> Graph:
    """The prompt that the page would send for a saved workflow."""
    links, graph = {link[0]: link for link in workflow["links"]}, Graph()
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values, inputs = iter([v for v in node.get("widgets_values") or []]), {}
        for entry in node.get("inputs", ()):
            if entry.get("widget"):
                value = next(values)
                while entry["name"] != "seed" and value in CONTROL:  # follows a seed, and is the page's own
                    value = next(values)
                inputs[entry["name"]] = value
            if entry.get("link") is not None:
                _, source, slot, *_ = links[entry["link"]]
                inputs[entry["name"]] = [str(source), slot]
        graph.nodes[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run_as_they_are_right_after_installing(server, path):
    graph = api_graph(json.loads(path.read_text("utf-8")))
    outputs = server.run(graph)
    pictures = [node for node in outputs.values() if "images" in node]
    assert pictures and {node["class_type"] for node in graph.nodes.values()} >= {
        "QuantPressLoadSource",
        "QuantPressQuantize",
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_has_a_picture_of_its_name_and_the_browser_lists_it(server, path):
    picture = path.with_suffix(".jpg").read_bytes()
    assert picture.startswith(b"\xff\xd8\xff")
    assert path.stem in server.call("/workflow_templates")["ComfyUI-QuantPress"]
    assert 20_000 < len(picture) < 400_000
