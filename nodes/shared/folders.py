"""Which files a node may read and write: those in ComfyUI's own folders, and no others.

Reading: a node input names a file as ComfyUI's own loaders list it, "folder/name". Whatever is not in that list, or
leaves its folder by "..", is refused. A link that the machine's owner put into a models folder is followed, as the
stock loaders do (models are often linked from a cache or another disk).
Writing: the name is cleaned and cannot leave its folder by "..". A linked subfolder is followed, as ComfyUI's own
savers do: only the machine's owner can make one. A target that is itself a link is replaced, never written through.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

import folder_paths

from ...quant_core.checkpoint.suffixes import INDEX_SUFFIX, SUFFIX, has_suffix
from ...quant_core.errors import InputFileError, OutputError, RequestError

SOURCE_FOLDERS = ("diffusion_models", "checkpoints", "text_encoders")
CALIBRATIONS = "calibrations"
LORAS = "loras"
OUTPUT = "output"
_SUFFIXES = (SUFFIX, ".sft", INDEX_SUFFIX)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*]')
_WINDOWS_DEVICES = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
_PACK = Path(__file__).resolve().parents[2]
_MAX_NAME_BYTES = 200  # of one part; file systems allow 255, and a temporary name beside it is longer


def list_models(*folders: str, shards: bool = True, suffixes: tuple[str, ...] = _SUFFIXES) -> list[str]:
    """ "folder/name" of every safetensors file in these model folders.

    shards: also of the indexes of models in shards. suffixes: of other files, where others are wanted.

    A shard itself is never listed. ComfyUI's own lists are asked, which it caches: walking a network drive takes time.
    """
    found = []
    for folder in folders:
        names = {
            name.replace(os.sep, "/") for name in folder_paths.get_filename_list(folder) if has_suffix(name, *suffixes)
        }
        parts = {name for name in names if _SHARD.search(name)}
        names = (names - parts) | (_indexes(folder, parts) if shards else set())
        found += [f"{folder}/{name}" for name in sorted(names, key=str.lower)]
    return found


def _indexes(folder: str, parts: set[str]) -> set[str]:
    """The indexes beside these shards; ComfyUI's lists leave them out for their suffix."""
    places = {str(PurePosixPath(part).parent) for part in parts}
    return {
        path.relative_to(root).as_posix()
        for root in folder_paths.get_folder_paths(folder)
        for place in places
        for path in Path(root, place).glob("*")
        if has_suffix(path.name, INDEX_SUFFIX)
    }


def resolve_model(name: str, *folders: str, suffixes: tuple[str, ...] = _SUFFIXES) -> Path:
    """The path of "folder/name", where folder is one of `folders`. RequestError for everything else."""
    folder, _, rest = name.replace("\\", "/").partition("/")
    if folder not in folders or not _is_plain(rest):
        raise RequestError(f"{name!r} is not a file in {', '.join(folders)}. Choose one from the list.")
    for root in folder_paths.get_folder_paths(folder):
        path = Path(root, rest)
        if path.is_file() and has_suffix(path.name, *suffixes):
            return path
    raise InputFileError(f"{name} is not there any more. Press R to refresh the list, and choose again.")


def _is_plain(relative: str) -> bool:
    parts = PurePosixPath(relative).parts
    return (
        bool(parts)
        and not relative.startswith("/")
        and not any(part == ".." or part.startswith("~") or _FORBIDDEN.search(part) for part in parts)
    )


def add_calibrations_folder() -> None:
    """models/calibrations becomes a folder of ComfyUI's, which users may place elsewhere like any other."""
    folder_paths.add_model_folder_path(CALIBRATIONS, os.path.join(folder_paths.models_dir, CALIBRATIONS))


def write_roots() -> dict[str, Path]:
    """Where Save may write: folder name -> its root.

    The first folder that exists; for models as ComfyUI orders them.
    """
    roots = {}
    for folder in (*SOURCE_FOLDERS, CALIBRATIONS, LORAS):
        # Never into the pack: it adds a folder of its own for the demo model.
        paths = [path for path in folder_paths.get_folder_paths(folder) if not Path(path).is_relative_to(_PACK)]
        # diffusion_models is also called unet: prefer the folder whose name people know.
        named = [path for path in paths if os.path.basename(os.path.normpath(path)) == folder and os.path.isdir(path)]
        existing = [path for path in paths if os.path.isdir(path)]
        roots[folder] = Path((named or existing or paths)[0])
    return roots | {OUTPUT: Path(folder_paths.get_output_directory())}


def write_target(folder: str, name: str) -> Path:
    """The file to write for a cleaned name below the folder's root; its parent exists afterwards.

    Raises RequestError (a name that leaves the folder), OutputError (the folder cannot be made).
    """
    roots = write_roots()
    if folder not in roots:
        raise RequestError(f"{folder!r} is not a folder to save to. Choose one of {', '.join(roots)}.")
    parts = _clean_parts(name)
    target = roots[folder].joinpath(*parts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise OutputError(
            f"{target.parent}: the folder cannot be made: {err.strerror}. Choose another folder."
        ) from err
    return target


def _clean_parts(name: str) -> list[str]:
    """The parts of a relative file name ending in .safetensors.

    RequestError where it is none that any system takes.
    """
    text = name.replace("\\", "/").strip()
    if not has_suffix(text, SUFFIX):
        text += SUFFIX
    parts = text.split("/")
    bad = [
        part
        for part in parts
        if part.strip(" .") == ""
        or part.startswith(".")
        or part.endswith((" ", "."))
        or _FORBIDDEN.search(part)
        or _WINDOWS_DEVICES.match(part)
        or len(part.encode()) > _MAX_NAME_BYTES
    ]
    if bad or text.lower() == SUFFIX:
        raise RequestError(
            f"{name!r} is not a file name: {bad[0] if bad else name!r} is empty, too long, starts with a dot, or "
            'holds one of < > : " | ? *. Use letters, digits, - and _, and / for a subfolder.'
        )
    return parts


def stamp(path: Path) -> str:
    """Changes when the file, or for an index any file beside it, is written: for ComfyUI's cache."""
    beside = sorted(path.parent.iterdir()) if has_suffix(path.name, INDEX_SUFFIX) else []
    paths = [found for found in beside if has_suffix(found.name, SUFFIX)]
    try:
        stats = [(found.name, found.stat()) for found in (path, *paths)]
    except OSError as err:
        raise InputFileError(f"{path}: {err.strerror}. Choose the file again.") from err
    return ";".join(f"{name}:{s.st_size}:{s.st_mtime_ns}:{s.st_ino}" for name, s in stats)
