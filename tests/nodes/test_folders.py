"""Which files node inputs may name, on a stand-in for ComfyUI's folder_paths (the real one needs no more)."""

import os
import sys
import types

import pytest
from comfyui_quantpress.quant_core.errors import OutputError, QuantPressError, RequestError


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The module under test, with models and output folders below tmp_path."""
    stub = types.ModuleType("folder_paths")
    paths = {
        name: [str(tmp_path / "models" / name)]
        for name in ("diffusion_models", "checkpoints", "text_encoders", "calibrations", "loras")
    }
    paths["diffusion_models"].insert(0, str(tmp_path / "models" / "unet"))
    stub.get_folder_paths = lambda name: paths[name]
    stub.get_output_directory = lambda: str(tmp_path / "output")

    def get_filename_list(name):
        """As ComfyUI lists: by suffix, an index is not among them."""
        return [
            os.path.relpath(os.path.join(folder, file), root)
            for root in paths[name]
            for folder, _, files in os.walk(root, followlinks=True)
            for file in files
            if file.lower().endswith((".safetensors", ".sft", ".ckpt"))
        ]

    stub.get_filename_list = get_filename_list
    monkeypatch.setitem(sys.modules, "folder_paths", stub)
    monkeypatch.delitem(sys.modules, "comfyui_quantpress.nodes.shared.folders", raising=False)
    import comfyui_quantpress.nodes.shared.folders as module

    for names in paths.values():
        os.makedirs(names[-1])
    os.makedirs(tmp_path / "output")
    yield module
    monkeypatch.delitem(sys.modules, "comfyui_quantpress.nodes.shared.folders", raising=False)


def put(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_models_are_listed_with_their_folder_and_shards_by_their_index(folders, tmp_path):
    models = tmp_path / "models/diffusion_models"
    for name in (
        "b.safetensors",
        "sub/a.sft",
        "s/m-00001-of-00002.safetensors",
        "s/m-00002-of-00002.safetensors",
        "s/m.safetensors.index.json",
        "notes.txt",
        "x.ckpt",
    ):
        put(models / name)
    put(tmp_path / "models/checkpoints/c.safetensors")
    assert folders.list_models("diffusion_models", "checkpoints") == [
        "diffusion_models/b.safetensors",
        "diffusion_models/s/m.safetensors.index.json",
        "diffusion_models/sub/a.sft",
        "checkpoints/c.safetensors",
    ]
    assert folders.list_models("diffusion_models", shards=False) == [
        "diffusion_models/b.safetensors",
        "diffusion_models/sub/a.sft",
    ]


def test_what_is_listed_resolves(folders, tmp_path):
    path = put(tmp_path / "models/diffusion_models/sub/a.safetensors")
    assert folders.resolve_model("diffusion_models/sub/a.safetensors", "diffusion_models") == path
    assert folders.resolve_model("diffusion_models\\sub\\a.safetensors", "diffusion_models") == path


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_models/../../secret.safetensors",
        "diffusion_models/sub/../../../secret.safetensors",
        "/secret.safetensors",
        "diffusion_models//secret.safetensors",
        "diffusion_models/~/secret.safetensors",
        "diffusion_models/C:/secret.safetensors",
        "diffusion_models\\..\\..\\secret.safetensors",
        "vae/secret.safetensors",
        "secret.safetensors",
        "diffusion_models/",
        "diffusion_models/secret\0.safetensors",
        "",
        "..",
    ],
)
def test_reading_outside_the_folders_is_refused(folders, tmp_path, name):
    put(tmp_path / "secret.safetensors")
    put(tmp_path / "models/secret.safetensors")
    put(tmp_path / "models/vae/secret.safetensors")
    with pytest.raises(RequestError, match="Choose one from the list"):
        folders.resolve_model(name, "diffusion_models")


@pytest.mark.parametrize("name", ["notes.txt", "gone.safetensors", "x.ckpt"])
def test_only_checkpoints_that_are_there_are_read(folders, tmp_path, name):
    for other in ("notes.txt", "x.ckpt"):
        put(tmp_path / "models/diffusion_models" / other)
    with pytest.raises(QuantPressError, match=name):
        folders.resolve_model(f"diffusion_models/{name}", "diffusion_models")


def test_a_link_that_the_owner_put_into_a_models_folder_is_read_like_comfyui_reads_it(folders, tmp_path):
    target = put(tmp_path / "elsewhere/blob")
    link = tmp_path / "models/diffusion_models/linked.safetensors"
    link.symlink_to(target)
    assert folders.resolve_model("diffusion_models/linked.safetensors", "diffusion_models") == link


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model", "model.safetensors"),
        ("sub/model.safetensors", "sub/model.safetensors"),
        (" a b ", "a b.safetensors"),
        ("sub\\model", "sub/model.safetensors"),
        ("größe-v1.5", "größe-v1.5.safetensors"),
    ],
)
def test_writing_inside_the_folder(folders, tmp_path, name, expected):
    target = folders.write_target("diffusion_models", name)
    assert target == tmp_path / "models/diffusion_models" / expected and target.parent.is_dir()
    assert folders.write_target("output", name) == tmp_path / "output" / expected


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../../x",
        "/etc/x",
        "..\\x",
        "C:\\x",
        "C:x",
        "~/x/../..",
        "a//b",
        "",
        "   ",
        ".",
        "..",
        ".hidden",
        "a/.hidden/b",
        "x\0y",
        "a\nb",
        "con",
        "sub/NUL.x",
        "trailing./x",
        "trailing /x",
        "a*b",
        "a?b",
        "a" * 300,
    ],
)
def test_writing_outside_the_folder_or_under_a_hopeless_name_is_refused(folders, tmp_path, name):
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(RequestError):
        folders.write_target("output", name)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("folder", ["diffusion_models", "loras", "output"])
@pytest.mark.parametrize("name", ["big disk/x", "big disk/new/x"])
def test_a_linked_subfolder_is_written_to_as_comfyuis_savers_do(folders, tmp_path, folder, name):
    outside, root = tmp_path / "outside", folders.write_roots()[folder]
    outside.mkdir()
    (root / "big disk").symlink_to(outside)
    target = folders.write_target(folder, name)
    assert target == root / f"{name}.safetensors"
    assert target.parent.resolve() == (outside / name.removeprefix("big disk/")).parent


@pytest.mark.parametrize("name", ["big disk/../x", "big disk/../../x"])
def test_a_name_never_climbs_out_of_a_linked_subfolder(folders, tmp_path, name):
    (tmp_path / "outside").mkdir()
    (tmp_path / "output/big disk").symlink_to(tmp_path / "outside")
    with pytest.raises(RequestError):
        folders.write_target("output", name)


@pytest.mark.parametrize("name", ["A.SAFETENSORS", "sub/b.Sft", "s/m.SafeTensors.index.json"])
def test_a_suffix_in_capitals_is_a_suffix(folders, tmp_path, name):
    """As for ComfyUI's lists and its loader."""
    path = put(tmp_path / "models/diffusion_models" / name)
    if name.endswith("json"):
        put(path.parent / "m-00001-of-00001.SAFETENSORS")
    assert folders.list_models("diffusion_models") == [f"diffusion_models/{name}"]
    assert folders.resolve_model(f"diffusion_models/{name}", "diffusion_models") == path


def test_a_name_keeps_the_suffix_that_was_typed(folders, tmp_path):
    target = folders.write_target("diffusion_models", "x.SAFETENSORS")
    assert target == tmp_path / "models/diffusion_models/x.SAFETENSORS"


def test_a_root_that_is_itself_a_link_is_fine(folders, tmp_path):
    real = tmp_path / "big disk"
    real.mkdir()
    (tmp_path / "models/checkpoints").rmdir()
    (tmp_path / "models/checkpoints").symlink_to(real)
    assert folders.write_target("checkpoints", "x").parent.resolve() == real


def test_an_unknown_folder_and_an_impossible_one_are_refused(folders, tmp_path):
    with pytest.raises(RequestError, match="not a folder to save to"):
        folders.write_target("custom_nodes", "x")
    put(tmp_path / "output/file")
    with pytest.raises(OutputError, match="cannot be made"):
        folders.write_target("output", "file/x")


def test_the_stamp_changes_with_the_file_and_with_any_shard(folders, tmp_path):
    one = put(tmp_path / "models/diffusion_models/one.safetensors")
    index = put(tmp_path / "models/diffusion_models/s/m.safetensors.index.json")
    shard = put(index.parent / "m-00001-of-00001.safetensors")
    before = folders.stamp(one), folders.stamp(index)
    assert (folders.stamp(one), folders.stamp(index)) == before
    os.utime(one, ns=(1, 1))
    os.utime(shard, ns=(1, 1))
    assert folders.stamp(one) != before[0] and folders.stamp(index) != before[1]
