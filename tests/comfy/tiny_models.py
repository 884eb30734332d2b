"""The table of tiny models, tiny_models.json, and a process of ComfyUI that does tasks with models.

An entry of the table: a variant of architecture_configs.json, what is made smaller, and what the model is given.
Sizes that ComfyUI's detection fixes stay; of what it counts there is one or two. large: most of the model is fixed,
so that its file has 0.5 to 1.8 GB. Mochi, Cosmos, HiDream, ACE-Step 1, OmniGen 2 and a few more are fixed wholly, and
not here: test_architecture_plans.py has their shapes. amplification: see test_tiny_models.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from comfy_server import COMFYUI, PYTHON

HERE = Path(__file__).parent
TABLE: dict[str, dict[str, Any]] = json.loads((HERE / "tiny_models.json").read_text("utf-8"))


class Worker:
    """A process that does tasks; one that ended on a task is started anew for the next.

    folder: for its log and its files. script: of this folder; it gets ComfyUI's folder and the arguments.
    """

    def __init__(self, folder: Path, script: str, *arguments: Path | str) -> None:
        self.folder, self._log = folder, folder / "worker.log"
        self._command = [PYTHON, HERE / script, COMFYUI, *arguments]
        self._process: subprocess.Popen[str] | None = None

    def ask(self, task: str, **arguments: Any) -> Any:
        """The answer to a task of the script. AssertionError, with the end of the log, when there is none."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps([task, arguments], default=str), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            self.end()
        assert line, f"{task} {arguments}:\n{self._log.read_text('utf-8', errors='replace')[-3000:]}"
        return json.loads(line)

    def _start(self) -> subprocess.Popen[str]:
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
                cwd=HERE,
            )
        return self._process

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
