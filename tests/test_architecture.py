"""ARCHITECTURE.md is the ground plan: it lists the folders, in the order of their imports."""

import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # last: tests/comfy must hide nobody's comfy
from import_graph import ORDER  # noqa: E402  the line above

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
ROOMS = re.findall(r"^\| `([a-z_/]+)` \| (.+) \|$", TEXT, re.MULTILINE)


def packages() -> set[str]:
    tops = ("quant_core", "layouts", "nodes", "cli", "demo")
    return {path.parent.relative_to(ROOT).as_posix() for top in tops for path in (ROOT / top).rglob("__init__.py")}


def test_every_folder_is_a_room_of_the_page_and_no_other_is():
    assert sorted(room for room, _ in ROOMS) == sorted(packages())


def test_the_rooms_of_the_engine_stand_in_the_order_of_their_imports():
    listed = [room for room, _ in ROOMS if room in ORDER and room.startswith("quant_core")]
    assert listed == [room for room in ORDER if room.startswith("quant_core")]


def test_every_room_has_one_line():
    assert [room for room, says in ROOMS if not 10 < len(says) < 120] == []


def test_the_page_of_measurements_names_every_script_and_every_file_of_rows():
    page = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    names = [path.name for path in (ROOT / "bench").rglob("*.py")]
    names += [path.stem for path in (ROOT / "bench" / "results").glob("*.jsonl")]
    assert len(names) > 20
    assert [name for name in names if f"{name}`" not in page and f"{name} " not in page] == []
