"""What ComfyUI, its registry and pip read in pyproject.toml: the rules of the registry, and files that are there."""

import sys
from pathlib import Path

import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(TEXT)["project"]
COMFY = tomllib.loads(TEXT)["tool"]["comfy"]

# comfy_config/config_parser.py of ComfyUI 0.29: one entry outside the list, and ComfyUI reads none of them.
ACCELERATORS = {
    "GPU :: NVIDIA CUDA",
    "GPU :: AMD ROCm",
    "GPU :: Intel Arc",
    "NPU :: Huawei Ascend",
    "GPU :: Apple Metal",
}
SYSTEMS = ("Microsoft", "POSIX", "MacOS", "OS Independent")


def of_kind(kind: str) -> list[str]:
    return [entry.removeprefix(f"{kind} :: ") for entry in PROJECT["classifiers"] if entry.startswith(f"{kind} ::")]


def test_the_name_follows_the_registrys_advice():
    """No "ComfyUI" in it, letters first: docs.comfy.org/registry/specifications."""
    name = PROJECT["name"]
    assert "comfy" not in name.lower() and name[0].isalpha() and len(name) < 100


def test_comfyui_reads_every_accelerator_and_system_named():
    assert of_kind("Environment") and set(of_kind("Environment")) <= ACCELERATORS
    assert of_kind("Operating System") and all(entry.startswith(SYSTEMS) for entry in of_kind("Operating System"))


@pytest.mark.parametrize("key", ["Icon", "Banner"])
def test_icon_and_banner_are_files_of_the_repository(key):
    repository = PROJECT["urls"]["Repository"].replace("https://github.com/", "https://raw.githubusercontent.com/")
    base, _, path = COMFY[key].partition("/main/")
    assert base == repository and (ROOT / path).is_file()
    # The registry wants a square icon of at most 400 pixels and a banner of 21 to 9.
    width, height = Image.open(ROOT / path).size
    assert width == height <= 400 if key == "Icon" else width * 9 == height * 21


def test_every_dependency_says_what_it_is_for():
    """All users pay for each of them."""
    block = TEXT.split("\ndependencies = [\n")[1].split("]\n")[0]
    assert len(block.splitlines()) == len(PROJECT["dependencies"])
    assert [line for line in block.splitlines() if '", # ' not in line] == []
