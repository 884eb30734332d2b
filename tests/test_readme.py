"""The pages cannot rot: commands are run, what they print is compared, tables are those of the registry."""

import argparse
import json
import re
import shlex
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from comfyui_quantpress.cli.commands.formats import _cells, describe
from comfyui_quantpress.cli.main import build_parser, main
from comfyui_quantpress.demo.load import load_model
from comfyui_quantpress.demo.sampler import load_conditioning, sample, starting_noise
from comfyui_quantpress.quant_core.calibration.capture.budget import plan_budget
from comfyui_quantpress.quant_core.calibration.capture.collector import Collector
from comfyui_quantpress.quant_core.calibration.capture.linear_modules import linear_modules
from comfyui_quantpress.quant_core.calibration.storage import save_calibration
from comfyui_quantpress.quant_core.formats import all_formats

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS_DOC = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
JSON_DOC = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
# Every page about the program. Their console blocks are run one after the other in one folder, the README's first.
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
FORMATS = all_formats()


def console_steps(text: str) -> list[tuple[list[str], str]]:
    """(arguments of quantpress, the output shown below it) of every `$ quantpress` line in ```console blocks."""
    steps = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = step.partition("\n")
            program, *args = shlex.split(command)
            assert program == "quantpress"
            steps.append((args, output))
    return steps


STEPS = [step for text in PAGES.values() for step in console_steps(text)]
COMMANDS = build_parser()._subparsers._group_actions[0].choices


def shape_of(output: str) -> str:
    """Words and lines; numbers, the units of speeds, rules and padding may differ."""
    numberless = re.sub(r"# \w+/s", "#/s", re.sub(r"\d[\d.,:]*", "#", output))
    return re.sub(r"[ \t-]+", " ", numberless).strip()


def test_console_steps_reads_commands_and_outputs():
    text = "```console\n$ quantpress a 'b c'\nout 1\n$ quantpress d\n```\n```bash\nquantpress no\n```\n"
    assert console_steps(text) == [(["a", "b c"], "out 1\n"), (["d"], "")]


def test_shape_of_tells_words_apart_and_not_numbers():
    assert shape_of("size  18.2 MB at 2 kB/s\n---") == shape_of("size 9 MB at 3.1 MB/s\n-----")
    assert shape_of("a\nb") != shape_of("a b")
    assert shape_of("3 layers kept") != shape_of("3 layers")


def test_every_command_has_an_example():
    assert {args[0] for args, _ in console_steps(COMMANDS_DOC)} == set(COMMANDS)


def test_the_readme_comes_to_comfyui_within_its_first_60_lines():
    lines = README.splitlines()
    assert lines.index("## In ComfyUI") < 60
    assert len(lines) <= 150


def capture_calibration(path: Path) -> None:
    """What the nodes would capture of the demo model, from one short sampling."""
    model = load_model(ROOT / "assets" / "tiny_mmdit_256.safetensors").model
    layers = linear_modules(model)
    collector = Collector(layers, plan_budget({name: layer.in_features for name, layer in layers.items()}))
    conditioning = load_conditioning(ROOT / "assets" / "conditioning.safetensors")
    with collector.capture(model, note="a circle"):
        sample(model, conditioning, [0], starting_noise(0, [0]), steps=2, cfg=3.0)
    save_calibration(collector.result(), path)


def test_the_examples_print_what_the_pages_show(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "assets" / "tiny_mmdit_256.safetensors", tmp_path / "model.safetensors")
    capture_calibration(tmp_path / "calibration.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("comfyui_quantpress.cli.shared.progress._LINE_EVERY_S", 1e9)
    for args, shown in STEPS:
        if args[0] == "demo":
            build_parser().parse_args(args)  # its run is tests/test_demo.py's
            continue
        assert main(args) == 0, args
        out, err = capsys.readouterr()
        assert err == "", args
        if shown:
            assert shape_of(out) == shape_of(shown), args


def test_options_and_commands_named_in_the_text_exist():
    known, parsers = set(), list(COMMANDS.values())
    while parsers:
        parser = parsers.pop()
        known |= set(parser._option_string_actions)
        for action in parser._actions:  # `merge` has commands of its own
            parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(PAGES.values())))
    assert {"--format", "--fallback", "--against"} <= named
    assert named - known == set()


def test_the_format_table_is_the_registrys():
    rows = [
        f"| `{fmt.name}` | {fmt.title} | " + " | ".join(_cells(describe(fmt))[i] for i in (2, 4, 5, 6)) + " |"
        for fmt in FORMATS
    ]
    assert [row for row in rows if row not in README] == []
    assert re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE) == [fmt.name for fmt in FORMATS]


def test_the_demo_table_names_every_format():
    (table,) = re.findall(r"^```text\n(format .*?)^```", MEASURED, re.MULTILINE | re.DOTALL)
    assert [line.split()[0] for line in table.splitlines()[2:]] == [fmt.name for fmt in FORMATS]


NUMBER_WORDS = {"sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20}


def counted_formats(text: str) -> list[int]:
    """What a page says of how many formats there are in all, in figures or in words from sixteen to twenty."""
    counts = re.findall(
        rf"\b(\d+|{'|'.join(NUMBER_WORDS)})\s+(?:8-bit\s+and\s+4-bit\s+)?formats\b", text, re.IGNORECASE
    )
    return [NUMBER_WORDS.get(count.lower()) or int(count) for count in counts]


def test_counted_formats_reads_figures_and_words():
    assert counted_formats("one of eighteen 8-bit\nand 4-bit formats; all 17 formats; two 8-bit formats") == [18, 17]


def test_a_page_that_counts_the_formats_counts_right():
    assert [path.name for path, text in PAGES.items() if {*counted_formats(text)} - {len(FORMATS)}] == []


# Every page of the repository, those of the nodes and of the demo's model too.
ALL_PAGES = {
    path: path.read_text(encoding="utf-8")
    for pattern in ("*.md", "docs/*.md", "web/docs/*.md", "assets/*.md", "bench/*.md")
    for path in sorted(ROOT.glob(pattern))
}


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def links_of(text: str) -> list[tuple[str, str]]:
    """(file, anchor) of a page's links and pictures within the repository; either may be empty."""
    targets = [target.partition("#") for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    return [(file, anchor) for file, _, anchor in targets]


def anchors_of(text: str) -> set[str]:
    """What GitHub makes of the headings: small letters, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_reads_files_and_anchors():
    assert links_of("[a](b.md#c) ![d](e.jpg) [f](https://g) [h](#i)") == [("b.md", "c"), ("e.jpg", ""), ("", "i")]


def test_anchors_of_reads_headings_and_not_code():
    assert anchors_of("# One, two\n```bash\n# no\n```\n## Three") == {"one-two", "three"}


def dead_links(path: Path, text: str) -> list[str]:
    dead = []
    for file, anchor in links_of(text):
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text(encoding="utf-8"))):
            dead.append(f"{file}#{anchor}")
    return dead


def test_dead_links_are_found():
    page = ROOT / "README.md"
    assert dead_links(page, "[a](LICENSE) [b](#x) [c](docs/no.md) [d](docs/json.md#no)") == [
        "#x",
        "docs/no.md#",
        "docs/json.md#no",
    ]


@pytest.mark.parametrize("path", ALL_PAGES, ids=page_name)
def test_links_lead_somewhere(path):
    assert dead_links(path, ALL_PAGES[path]) == []


TOP_FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {"demo_out"}
FILES = [path.relative_to(ROOT).as_posix() for top in TOP_FOLDERS for path in (ROOT / top).rglob("*")]
FILES += [path.name for path in ROOT.iterdir()]
SOURCE_SUFFIXES = (".py", ".jsonl", ".md", ".toml")


def missing_paths(text: str) -> list[str]:
    """Words in `code` that read as files or folders of the repository and are none; * stands for anything.

    Those that begin with a top folder, and names of sources and results, which may stand without their first folders.
    """
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    missing = []
    for word in " ".join(re.findall(r"`([^`\n]+)`", prose)).split():
        inside = "/" in word and word.split("/")[0] in TOP_FOLDERS
        if not re.fullmatch(r"\w[\w.*-]*(/[\w.*-]+)*/?", word) or not (inside or word.endswith(SOURCE_SUFFIXES)):
            continue
        patterns = (word.rstrip("/"), f"*/{word}")
        if not any(fnmatchcase(file, pattern) for pattern in patterns for file in FILES):
            missing.append(word)
    return missing


def test_missing_paths_are_found_and_others_let_pass():
    assert (
        missing_paths(
            "`docs/json.md` `bench/results/*.jsonl` `layouts/` `capability.py` `kernels/jit.py` `models/loras/x`"
        )
        == []
    )
    assert missing_paths("`docs/no.md` `no.py` `quant_core/no/` `bench/no*.jsonl` `a/b.py`") == [
        "docs/no.md",
        "no.py",
        "quant_core/no/",
        "bench/no*.jsonl",
        "a/b.py",
    ]


@pytest.mark.parametrize("path", ALL_PAGES, ids=page_name)
def test_paths_named_in_a_page_exist(path):
    assert missing_paths(ALL_PAGES[path]) == []


NODES = [page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for page in ROOT.glob("web/docs/*.md")]


def test_every_node_is_named():
    """By the titles of the nodes' pages, which are their display names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(NODES) > 20 and [node for node in NODES if node not in text] == []


def test_the_changelog_names_every_command():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [command for command in COMMANDS if f"- `{command}`" not in text] == []


def test_the_readme_leads_to_every_page():
    linked = {(ROOT / file).resolve() for file, _ in links_of(README)}
    assert [path.name for path in PAGES if path.parent != ROOT and path not in linked] == []


def keys_of(value) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("command", ["quantize", "dry-run", "inspect", "verify", "formats", "calibration"])
def test_every_json_field_is_documented(command, tmp_path, capsys):
    source, target = ROOT / "assets" / "tiny_mmdit_256.safetensors", tmp_path / "out.safetensors"
    calibration = tmp_path / "calibration.safetensors"
    capture_calibration(calibration)
    quantize = [
        "quantize",
        str(source),
        str(target),
        "--format",
        "bnb_nf4",
        "--only",
        r"blocks\.0",
        "--json",
        "--calibration",
        str(calibration),
        "--rounding",
        "nearest",
    ]
    args = {
        "quantize": quantize,
        "dry-run": [*quantize, "--dry-run"],
        "inspect": ["inspect", str(target), "--json"],
        "verify": ["verify", str(target), "--against", str(source), "--json"],
        "formats": ["formats", "--json"],
        "calibration": ["calibration", "inspect", str(calibration), "--json"],
    }
    if command in ("inspect", "verify"):
        assert main(quantize) == 0
        capsys.readouterr()
    assert main(args[command]) == 0
    undocumented = {key for key in keys_of(json.loads(capsys.readouterr().out)) if f"`{key}`" not in JSON_DOC}
    assert undocumented - {"keep", "only", ""} == set()  # inside the recorded policy; the label of rows without one


def test_finding_codes_are_documented():
    source = (ROOT / "quant_core" / "pipeline" / "verify.py").read_text(encoding="utf-8")
    codes = set(re.findall(r'(?:Finding|problem)\(\s*"([a-z-]+)"', source))
    assert len(codes) > 10 and {code for code in codes if f"`{code}`" not in JSON_DOC} == set()
