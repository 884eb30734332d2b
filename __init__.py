"""QuantPress, as ComfyUI sees it: the V3 entry point and the web folder.

ComfyUI imports this folder by path under a name of its own, pip as `comfyui_quantpress`: relative imports only.
Without ComfyUI the import does nothing and is cheap (no torch), so that the command line starts fast.
"""

from importlib.util import find_spec

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

WEB_DIRECTORY = "./web"


def _inside_comfyui() -> bool:
    # `comfy` is a namespace package, so any folder called comfy in the working directory would pass for it.
    # So ask for a module in it.
    return find_spec("comfy") is not None and find_spec("comfy.ops") is not None


def _register_layouts() -> None:
    # At import and not in comfy_entrypoint: a checkpoint may be loaded by a stock node before any of ours is built.
    from .layouts import comfyui

    comfyui.register()


async def comfy_entrypoint():
    """Return the V3 extension; raises ModuleNotFoundError where `comfy_api` is missing (outside ComfyUI)."""
    from .nodes.extension import QuantPressExtension

    return QuantPressExtension()


if _inside_comfyui():
    _register_layouts()
