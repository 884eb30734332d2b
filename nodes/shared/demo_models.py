"""The demo's model and decoder in the stock loaders' lists: the example workflows run right after installing."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import folder_paths

log = logging.getLogger(__name__)

PACK = Path(__file__).resolve().parents[2]
DEMO_FOLDER = PACK / ".demo"
# (folder of ComfyUI, name in its list, file in assets/).
# Flat names: a subfolder would be spelled differently on Windows.
_OFFERED = (
    ("diffusion_models", "quantpress_demo_model.safetensors", "tiny_mmdit_256.safetensors"),
    ("vae", "quantpress_demo_vae.safetensors", "tiny_taesd.safetensors"),
)


def offer() -> None:
    """Link (or copy, 23 MB) the files into folders of their own and add these to ComfyUI's paths.

    Raises nothing: without them only the examples ask for other files.
    """
    for kind, name, asset in _OFFERED:
        link = DEMO_FOLDER / kind / name
        try:
            if not link.is_file():
                link.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(PACK / "assets" / asset, link)
        except OSError as err:
            log.info("QuantPress: the demo model is not offered to the loaders: %s", err)
            return
        folder_paths.add_model_folder_path(kind, str(link.parent))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)
