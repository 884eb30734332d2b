"""A ComfyUI server with this pack installed, for the whole session; skipped where no ComfyUI is present."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from comfy_server import COMFYUI, PYTHON, ROOT, Server, missing  # noqa: E402


def make_base(folder: Path, models: Path) -> Path:
    """A base folder with the pack in custom_nodes and links to the models."""
    for name in (
        "custom_nodes",
        "models/diffusion_models",
        "models/loras",
        "models/checkpoints",
        "input",
        "output",
        "temp",
        "user",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "custom_nodes" / "ComfyUI-QuantPress").symlink_to(ROOT)
    for model in models.iterdir():
        shutil.copyfile(model, folder / "models/diffusion_models" / model.name)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trained SD3-type model, a random Flux and a random Wan."""
    if missing():
        pytest.skip(missing())
    folder = tmp_path_factory.mktemp("models")
    shutil.copyfile(ROOT / "assets/tiny_mmdit_256.safetensors", folder / "trained_sd3.safetensors")
    subprocess.run(
        [PYTHON, ROOT / "tests/comfy/build_models.py", COMFYUI, folder], check=True, capture_output=True, timeout=180
    )
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    return make_base(tmp_path_factory.mktemp("comfy") / "base", models)


@pytest.fixture(scope="session")
def server(base: Path) -> Iterator[Server]:
    with Server(base) as running:
        yield running


@pytest.fixture
def server_with(tmp_path: Path, models: Path) -> Iterator[Callable[..., Server]]:
    """Start one more server with other arguments, in a base folder of its own; `prepare(base)` may change it first."""
    started: list[Server] = []

    def start(*args: str, prepare: Callable[[Path], None] = lambda base: None) -> Server:
        folder = make_base(tmp_path / f"base{len(started)}", models)
        prepare(folder)
        started.append(Server(folder, *args).__enter__())
        return started[-1]

    yield start
    for running in started:
        running.__exit__(None, None, None)
