"""Settings that must stand before any test module is imported."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

if not torch.cuda.is_available():
    # triton reads it when a kernel is DEFINED, its own library included: set it before triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# The tensors are small and the cores few: a second thread costs more than it gives. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


class RootIsAPlainFolder:
    """pytest takes the root, for its __init__.py, for a test package and imports it: a second copy of the pack."""

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    # A plugin object, because pytest asks the hooks of this conftest only about folders below tests/.
    config.pluginmanager.register(RootIsAPlainFolder())
