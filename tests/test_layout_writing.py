"""Files and folders are written whole: old content or new, never half, whatever happens in between."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mlx_distill import layout
from mlx_distill.errors import FolderError, ResourceError
from tests.children import killed


def tree(folder: Path) -> dict[str, str]:
    """What is in a folder, hidden files and all."""
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}


# Files.


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "x.json"
    with layout.atomic_file(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert not path.exists()
        assert (temporary.parent, temporary.suffix) == (path.parent, path.suffix)
    assert tree(tmp_path) == {"deep/er/x.json": "new"}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("problem", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_an_exception_leaves_the_old_file(tmp_path: Path, old: str | None, problem: BaseException) -> None:
    path = tmp_path / "x.json"
    if old:
        path.write_text(old, encoding="utf-8")
    before = tree(tmp_path)
    with pytest.raises(type(problem)), layout.atomic_file(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise problem
    assert tree(tmp_path) == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "x.json"
    layout.write_text(path, "old")

    def full(*_arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner: Any = {"fsync": os, "replace": Path}[call]
    monkeypatch.setattr(owner, call, full)
    with pytest.raises(ResourceError, match="could not be written: No space left on device") as caught:
        layout.write_text(path, "new")
    assert caught.value.hint == "What was there before is unchanged."
    assert tree(tmp_path) == {"x.json": "old"}


@pytest.mark.parametrize("moment", ["before any byte", "half written", "whole, not renamed"])
def test_a_killed_writer_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "x.json"
    layout.write_text(path, "old")
    content = {"before any byte": "", "half written": "ne", "whole, not renamed": "new"}[moment]
    killed(
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with layout.atomic_file(argv[0]) as temporary:\n"
        f"    temporary.write_text({content!r})\n" + ("" if content == "new" else "    os.kill(os.getpid(), 9)\n"),
        path,
    )
    assert path.read_text(encoding="utf-8") == "old"
    assert len(tree(tmp_path)) == 2  # What the dead one left, until the next holder of the folder sweeps.
    layout.sweep(tmp_path)
    assert tree(tmp_path) == {"x.json": "old"}


def test_a_place_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for path in (tmp_path / "file" / "below.json", tmp_path / ("n" * 300)):
        with pytest.raises(ResourceError, match="could not be written"):
            layout.write_text(path, "new")
    with pytest.raises(ResourceError), layout.atomic_folder(tmp_path / "file" / "below"):
        pass
    assert tree(tmp_path) == {"file": "x"}


def test_what_is_not_a_file_is_never_replaced(tmp_path: Path) -> None:
    """A process of root could otherwise put a file in the place of /dev/null."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "folder", tmp_path / "pipe"):
        with pytest.raises(FolderError, match="is not a file"):
            layout.write_text(path, "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_another_file_that_failed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with (
        pytest.raises(ResourceError, match=r"x\.json could not be written: No such file .*nowhere/input"),
        layout.atomic_file(path),
    ):
        (tmp_path / "nowhere" / "input").read_bytes()


# Folders.


def write_folder(path: Path, content: str, count: int = 2) -> None:
    with layout.atomic_folder(path) as temporary:
        for number in range(count):
            (temporary / "sub").mkdir(exist_ok=True)
            (temporary / "sub" / f"{number}").write_text(content, encoding="utf-8")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", "old", count=3)
    write_folder(tmp_path / "out", "new", count=2)
    assert tree(tmp_path) == {"out/sub/0": "new", "out/sub/1": "new"}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("problem", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_folder(tmp_path: Path, problem: BaseException) -> None:
    write_folder(tmp_path / "out", "old")
    before = tree(tmp_path)
    with pytest.raises(type(problem)), layout.atomic_folder(tmp_path / "out") as temporary:
        (temporary / "half").write_text("h", encoding="utf-8")
        raise problem
    assert tree(tmp_path) == before


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_renamed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """The first rename takes the old folder away, the second puts the new one in its place."""
    write_folder(tmp_path / "out", "old")
    before = tree(tmp_path)
    calls = iter(range(1, 10))
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if next(calls) == failing:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ResourceError, match="Disk quota exceeded"):
        write_folder(tmp_path / "out", "new")
    assert tree(tmp_path) == before


KILL_AT_RENAME = """
count, rename = 0, Path.rename
def dying(self, target):
    global count
    count += 1
    if count == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = dying
with layout.atomic_folder(argv[0]) as temporary:
    (temporary / "sub").mkdir()
    (temporary / "sub" / "0").write_text("new")
"""


@pytest.mark.parametrize("at", [1, 2])
def test_a_killed_writer_leaves_the_old_folder(tmp_path: Path, at: int) -> None:
    write_folder(tmp_path / "out", "old", count=1)
    killed(KILL_AT_RENAME.format(at=at), tmp_path / "out")
    layout.sweep(tmp_path)
    assert tree(tmp_path) == {"out/sub/0": "old"}


def test_a_writer_killed_while_it_cleans_up_leaves_the_new_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", "old", count=1)
    killed(
        "import shutil\nshutil.rmtree = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        + KILL_AT_RENAME.format(at=0),
        tmp_path / "out",
    )
    layout.sweep(tmp_path)
    assert tree(tmp_path) == {"out/sub/0": "new"}


def test_a_sweep_takes_nothing_that_is_not_ours(tmp_path: Path) -> None:
    names = [
        ".env",
        ".my-settings.json",
        ".git-password",
        ".part-abcdefgh",
        "x.part-abcdefgh",
        ".x.part-short",
        ".lock",
    ]
    for name in names:
        (tmp_path / name).write_text("mine", encoding="utf-8")
    layout.sweep(tmp_path)
    assert sorted(tree(tmp_path)) == sorted(names)
    layout.sweep(tmp_path / "nowhere")
