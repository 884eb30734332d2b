"""Atomicity: whatever fails, or is refused, or is killed, nothing new stands under the target's name."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
from comfyui_quantpress.quant_core.checkpoint import part as part_module
from comfyui_quantpress.quant_core.checkpoint.sink import OutputTensor, Sink, open_sink
from comfyui_quantpress.quant_core.errors import OutputError, VerificationError

PLAN = (
    OutputTensor("a", "U8", (3,)),
    OutputTensor("w", "BF16", (2, 3)),
    OutputTensor("s", "F32", ()),
    OutputTensor("none", "F32", (0, 4)),
)
TENSORS = {
    "a": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "s": torch.tensor(0.5),
}


def fill(sink: Sink) -> None:
    for name, tensor in TENSORS.items():
        sink.write(name, tensor)


def raising(error: BaseException):
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "out" / "model.safetensors"


@pytest.fixture(autouse=True)
def folder(target) -> Path:
    target.parent.mkdir()
    return target.parent


def refused(target: Path, message: str, **options: object) -> None:
    """open_sink refuses, and leaves the target's folder as it was."""
    before = {path: path.lstat().st_mtime_ns for path in target.parent.rglob("*")}
    with pytest.raises(OutputError, match=message) as caught:
        open_sink(target, PLAN, {}, **options)
    assert str(target) in str(caught.value)
    assert {path: path.lstat().st_mtime_ns for path in target.parent.rglob("*")} == before


def test_a_target_that_cannot_be_is_refused_with_what_to_do(target, folder, monkeypatch):
    refused(folder, "is a directory; .* Add a name")
    refused(folder / "model.sft", "must end in .safetensors")
    refused(folder / ".safetensors", "must end in .safetensors")
    refused(folder / "absent" / "x.safetensors", "the folder .*absent is missing. Create it")
    refused(folder / f"{'x' * 240}.safetensors", "cannot be written: .* Choose a shorter name")
    refused(target, r"needs 0.000 GB .* 0.000 GB are free. Free some", free_bytes=lambda _: 10)
    target.write_bytes(b"mine")
    refused(target, "the target exists. Choose another name, or allow overwriting")
    refused(target, "file needs", free_bytes=lambda _: 10, overwrite=True)
    assert target.read_bytes() == b"mine"
    (folder / "dangling.safetensors").symlink_to(folder / "nowhere")
    refused(folder / "dangling.safetensors", "the target exists")
    # As root every folder is writable: the answer is replaced, not the permissions.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    refused(folder / "other.safetensors", "out is not writable")


def test_exactly_enough_disk_space_is_enough(target):
    with open_sink(target, PLAN, {}) as sink:
        needed = sink.nbytes
    open_sink(target, PLAN, {}, free_bytes=lambda _: needed).close()
    refused(target, "disk space", free_bytes=lambda _: needed - 1)


@pytest.mark.parametrize("kind", ["itself", "symlink", "hardlink", "dotted path", "source is the link"])
def test_a_source_is_never_the_target_under_whatever_name(folder, kind):
    source = folder / "source.safetensors"
    safetensors.torch.save_file(TENSORS, source)
    link = folder / "link.safetensors"
    target, given = link, source
    if kind == "itself":
        target = source
    elif kind == "hardlink":
        os.link(source, link)
    elif kind == "dotted path":
        target = folder / ".." / "out" / "source.safetensors"
    else:
        link.symlink_to(source)
    if kind == "source is the link":
        target, given = source, link
    content = source.read_bytes()
    refused(target, "same file as the source", overwrite=True, sources=(folder / "other", given))
    assert source.read_bytes() == content


def test_overwriting_replaces_the_file_only_at_commit(target, folder):
    target.write_bytes(b"old")
    with open_sink(target, PLAN, {}, overwrite=True) as sink:
        fill(sink)
        assert target.read_bytes() == b"old"
        assert [path.suffix for path in folder.iterdir() if path != target] == [".part"]
        sink.commit()
    assert safetensors.torch.load_file(target)["w"].equal(TENSORS["w"])
    assert list(folder.iterdir()) == [target]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(target, folder, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", raising(OSError(errno.EPERM, "Operation not permitted")))
    with (
        pytest.raises(OutputError, match="appeared while ours was being written"),
        open_sink(target, PLAN, {}) as sink,
    ):
        fill(sink)
        target.write_bytes(b"theirs")
        sink.commit()
    assert target.read_bytes() == b"theirs"
    assert list(folder.iterdir()) == [target]


@pytest.mark.parametrize("links", [True, False])
def test_with_hard_links_or_without_the_file_stands_alone_in_its_folder(target, folder, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", raising(OSError(errno.EPERM, "Operation not permitted")))
    with open_sink(target, PLAN, {}) as sink:
        fill(sink)
        sink.commit()
    assert list(folder.iterdir()) == [target]
    assert safetensors.torch.load_file(target)["w"].equal(TENSORS["w"])


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("moment", ["before", "half", "in verify"])
def test_leaving_without_commit_leaves_nothing(target, folder, error, moment):
    with pytest.raises(type(error)), open_sink(target, PLAN, {}) as sink:
        if moment == "half":
            sink.write("w", TENSORS["w"])
        if moment == "in verify":
            fill(sink)
            sink.commit(raising(error))
        raise error
    assert list(folder.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        sink.write("w", TENSORS["w"])


def test_a_generator_that_is_dropped_leaves_nothing(target, folder):
    def job():
        with open_sink(target, PLAN, {}) as sink:
            for name, tensor in TENSORS.items():
                sink.write(name, tensor)
                yield name
            sink.commit()

    running = job()
    next(running)
    assert len(list(folder.iterdir())) == 1
    running.close()
    assert list(folder.iterdir()) == []


def test_verify_sees_the_finished_file_and_can_refuse_it(target, folder):
    seen = []

    def check(path: Path) -> None:
        seen.append({name: tensor.tolist() for name, tensor in safetensors.torch.load_file(path).items()})
        raise VerificationError("w: too far off")

    with pytest.raises(VerificationError, match="too far off"), open_sink(target, PLAN, {}) as sink:
        fill(sink)
        sink.commit(check)
    assert seen == [{**{name: tensor.tolist() for name, tensor in TENSORS.items()}, "none": []}]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda part: os.truncate(part, part.stat().st_size - 1), "cannot be read back .*1 bytes are missing"),
        (lambda part: part.write_bytes(part.read_bytes().replace(b'"BF16"', b'"XF16"')), "read back .*dtype 'XF16'"),
        (
            lambda part: part.write_bytes(part.read_bytes().replace(b'"BF16"', b'"F16" ')),
            "header reads back differently",
        ),
    ],
)
def test_a_file_that_does_not_read_back_as_planned_is_no_output(target, folder, damage, message):
    with pytest.raises(VerificationError, match=message), open_sink(target, PLAN, {}) as sink:
        fill(sink)
        damage(sink.part)
        sink.commit()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EIO, "Check the disk"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no permission"),
    ],
)
@pytest.mark.parametrize("call", ["open", "posix_fallocate", "ftruncate", "pwrite", "fsync", "replace"])
def test_a_failing_disk_is_an_output_error_and_leaves_nothing(target, folder, monkeypatch, call, number, message):
    if not hasattr(os, call):
        pytest.skip(f"this system has no os.{call}")
    late = call in ("pwrite", "fsync", "replace")
    fail = raising(OSError(number, os.strerror(number)))
    with pytest.raises(OutputError, match=f"model.safetensors: .*{os.strerror(number)}.*{message}"):
        if not late:
            monkeypatch.setattr(os, call, fail)
        with open_sink(target, PLAN, {}, overwrite=True) as sink:
            sink.write("a", TENSORS["a"])
            with monkeypatch.context() as patch:
                patch.setattr(os, call, fail)
                sink.write("w", TENSORS["w"])
                sink.write("s", TENSORS["s"])
                sink.commit()
    assert list(folder.iterdir()) == []


def test_after_a_failed_write_nothing_is_committed(target, folder, monkeypatch):
    with open_sink(target, PLAN, {}) as sink:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", raising(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                sink.write("a", TENSORS["a"])
        for step in (lambda: sink.write("w", TENSORS["w"]), sink.commit):
            with pytest.raises(OutputError, match="an earlier write failed"):
                step()
    assert list(folder.iterdir()) == []


def test_a_file_system_that_cannot_reserve_still_gets_the_file(target, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", raising(OSError(errno.EOPNOTSUPP, "Not supported")), raising=False)
    with open_sink(target, PLAN, {}) as sink:
        assert sink.part.stat().st_size == sink.nbytes
        fill(sink)
        sink.commit()
    assert safetensors.torch.load_file(target)["w"].equal(TENSORS["w"])


KILLED = """
    import sys, time, torch
    from comfyui_quantpress.quant_core.checkpoint.sink import OutputTensor, open_sink
    with open_sink(sys.argv[1], [OutputTensor("a", "U8", (3,)), OutputTensor("b", "U8", (3,))], {}) as sink:
        sink.write("a", torch.zeros(3, dtype=torch.uint8))
        sys.stdout.write("written\\n")
        sys.stdout.flush()
        time.sleep(60)
"""


def test_a_killed_process_leaves_no_file_and_its_part_goes_with_the_next_run(target, folder):
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(target)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    (part,) = folder.iterdir()
    assert f".{process.pid}-" in part.name
    old = part.stat().st_mtime - part_module.STALE_AFTER_S - 60
    os.utime(part, (old, old))
    open_sink(target, PLAN, {}).close()
    assert list(folder.iterdir()) == [part]  # old, but its process lives
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(folder.iterdir()) == [part]
    assert part.suffix == ".part"
    os.utime(part)
    open_sink(target, PLAN, {}).close()
    assert list(folder.iterdir()) == [part]  # gone, but too young: the pid may be one of another machine
    os.utime(part, (old, old))
    open_sink(folder / "another.safetensors", PLAN, {}).close()
    assert list(folder.iterdir()) == [part]  # of another target
    open_sink(target, PLAN, {}).close()
    assert list(folder.iterdir()) == []
