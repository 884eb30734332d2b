"""No command replaces a file that it reads, under whatever name the target leads there, --overwrite or not."""

import os
from pathlib import Path

import pytest
import torch
from comfyui_quantpress.cli.main import main
from safetensors.torch import save_file

NAMES = ("itself", "symlink", "hard link", "linked folder", "dotted path", "source is the link")
COMMANDS = {
    "quantize": ("plain", "quantize {source} {target} --format int8_rowwise"),
    "quantize with --residual-lora": (
        "plain",
        "quantize {source} {other} --format int8_rowwise --residual-lora {target} --residual-rank 4",
    ),
    "template": ("plain", "template {source} {target}"),
    "compat": ("plain", "compat -i {source} -o {target} --simple"),
    "compat in two steps": ("plain", "compat -i {source} -o {target} --simple --input_scale"),
    "merge lora": ("plain", "merge lora {source} {target} --lora {lora}"),
    "merge lora over the LoRA": ("lora", "merge lora {plain} {target} --lora {source}"),
    "merge extract": ("checkpoint", "merge extract {source} {target}"),
    "merge insert over the checkpoint": ("checkpoint", "merge insert {source} {plain} {target}"),
    "merge insert over the model": ("plain", "merge insert {checkpoint} {source} {target}"),
    "dequantize": ("fp8", "dequantize {source} {target}"),
    "requantize": ("fp8", "requantize {source} {target} --format int8_rowwise"),
    "migrate": ("fp8", "migrate {source} {target} --to legacy"),
    "edit": ("fp8", "edit {source} {target} --header drop"),
    "bitsandbytes export": ("nf4", "bitsandbytes export {source} {target}"),
    "repair": ("broken", "repair {source} {target}"),
    "calibrate": ("fp8", "calibrate {source} {target} --simulate --samples 16"),
    "calibrate over the file of the scales": ("scaled", "calibrate {fp8} {target} --input-scales {source}"),
}


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    paths = {
        kind: tmp_path / "files" / kind / "model.safetensors" for kind in ("plain", "lora", "checkpoint", "fp8", "nf4")
    }
    for path in paths.values():
        path.parent.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {f"blocks.{i}.qkv.weight": torch.randn(128, 64, generator=generator).bfloat16() for i in range(2)}
    save_file(tensors, paths["plain"])
    save_file(
        {"blocks.0.qkv.lora_up.weight": torch.ones(128, 2), "blocks.0.qkv.lora_down.weight": torch.ones(2, 64)},
        paths["lora"],
    )
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, paths["checkpoint"])
    for kind, fmt in (("fp8", "float8_e4m3fn"), ("nf4", "bnb_nf4")):
        assert main(["quantize", str(paths["plain"]), str(paths[kind]), "--format", fmt]) == 0
    return paths | {"other": tmp_path / "files" / "other.safetensors"}


def prepared(kind: str, files: dict[str, Path]) -> Path:
    """The file of this kind, where it takes a step of its own to make it."""
    if kind in files:
        return files[kind]
    path = files["other"].with_name(f"{kind}.safetensors")
    if kind == "scaled":
        assert main(["calibrate", str(files["fp8"]), str(path), "--simulate", "--samples", "16"]) == 0
    else:
        assert main(["edit", str(files["fp8"]), str(path), "--header", "drop"]) == 0
    return path


def target_named(how: str, source: Path) -> tuple[Path, Path]:
    """(source, target) as the command gets them: two names of one file."""
    link = source.with_name("link.safetensors")
    if how == "hard link":
        os.link(source, link)
    elif how == "linked folder":
        folder = source.parent.with_name(f"{source.parent.name}-linked")
        folder.symlink_to(source.parent)
        return source, folder / source.name
    elif how == "dotted path":
        return source, source.parent / ".." / source.parent.name / source.name
    elif how != "itself":
        link.symlink_to(source)
    return (link, source) if how == "source is the link" else (source, source if how == "itself" else link)


@pytest.mark.parametrize("how", NAMES)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_replaces_a_file_that_it_reads(command, how, files, capsys):
    kind, words = COMMANDS[command]
    source, target = target_named(how, prepared(kind, files))
    before, names = source.read_bytes(), sorted(files["other"].parent.rglob("*"))
    capsys.readouterr()
    texts = {name: str(path) for name, path in files.items()} | {"source": str(source), "target": str(target)}
    code = main([word.format(**texts) for word in words.split()] + ["--overwrite"])
    error = capsys.readouterr().err
    assert code == 1 and "the same file as the source" in error and str(target) in error and str(source) in error
    assert source.read_bytes() == before and sorted(files["other"].parent.rglob("*")) == names


def split(files: dict[str, Path], folder: Path) -> Path:
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    assert main(["merge", "split", str(files["plain"]), str(index), "--max-gb", "0.00002"]) == 0
    return index


@pytest.mark.parametrize("command", ["quantize {index} {shard} --format int8_rowwise", "merge join {index} {shard}"])
def test_no_shard_of_an_index_is_replaced(command, files, tmp_path, capsys):
    index = split(files, tmp_path / "shards")
    shard = index.with_name("model-00002-of-00002.safetensors")
    before = shard.read_bytes()
    words = [word.format(index=index, shard=shard) for word in command.split()]
    assert main([*words, "--overwrite"]) == 1
    assert f"the same file as the source {shard}" in capsys.readouterr().err and shard.read_bytes() == before


@pytest.mark.parametrize("max_gb", ["0.00002", "1"])
def test_splitting_never_replaces_the_index_or_the_shards_that_it_reads(max_gb, files, tmp_path, capsys):
    index = split(files, tmp_path / "shards")
    before = {path.name: path.read_bytes() for path in index.parent.iterdir()}
    assert main(["merge", "split", str(index), str(index), "--max-gb", max_gb, "--overwrite"]) == 1
    assert "the same file as the source" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in index.parent.iterdir()} == before


def test_a_scratch_file_of_compat_is_nobodys(files, capsys):
    source = files["plain"].with_name("out.without_input_scale.safetensors")
    files["plain"].rename(source)
    before = source.read_bytes()
    words = ["compat", "-i", str(source), "-o", str(source.with_name("out.safetensors")), "--simple", "--input_scale"]
    assert main([*words, "--overwrite"]) == 1
    assert f"{source}: the file is needed between two steps" in capsys.readouterr().err
    assert source.read_bytes() == before
