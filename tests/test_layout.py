"""Rows, records, locks, disks and shipped files: nothing half, nothing shared, and a clear word where it fails."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from mlx_distill import layout
from mlx_distill.errors import FolderError, InputError, ResourceError
from mlx_distill.manifest import DropCount
from tests.children import child, killed

# Rows.


def row(number: int, reason: str = "failed") -> DropCount:
    return DropCount(reason=reason, count=number)


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [row(n, reason) for n, reason in enumerate(["a", "zwei\nZeilen", "\u2028", "漢🙂", "", "\x85"])]
    for one in rows:
        layout.append_row(path, one)
    assert layout.read_rows(path, DropCount) == rows
    assert path.read_bytes().count(b"\n") == len(rows)


def test_no_file_holds_no_rows(tmp_path: Path) -> None:
    assert layout.read_rows(tmp_path / "none.jsonl", DropCount) == []
    layout.drop_torn_line(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


@given(cut=st.integers(1, 200))
@examples(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_torn_anywhere_gives_its_whole_rows_and_goes_on(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.unlink(missing_ok=True)
    rows = [row(n, "Grüße 漢🙂") for n in range(4)]
    for one in rows:
        layout.append_row(path, one)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - min(cut, len(whole))])
    left = path.read_bytes().count(b"\n")
    assert layout.read_rows(path, DropCount) == rows[:left]
    layout.drop_torn_line(path)
    layout.append_row(path, row(99))
    assert layout.read_rows(path, DropCount) == [*rows[:left], row(99)]


@pytest.mark.parametrize("tail", [b"\x00" * 30, b'{"reason": "\xc3', b"{"])
def test_a_torn_line_may_hold_anything(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    layout.append_row(path, row(1))
    with path.open("ab") as file:
        file.write(tail)
    assert layout.read_rows(path, DropCount) == [row(1)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{\n", "EOF while parsing"),
        (b"\n", "EOF while parsing"),
        (b'{"reason": "x", "count": -1}\n', "count: Input should be greater than or equal to 0"),
        (b'{"reason": "x"}\n', "count: Field required"),
        (b'{"reason": "x", "count": 1, "more": 2}\n', "more: Extra inputs are not permitted"),
        (b'{"reason": "\xff", "count": 1}\n', "invalid unicode"),
        (b"\x00\x00\n", "expected value"),
    ],
)
def test_a_whole_line_that_is_no_row_is_told_by_file_and_line(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "rows.jsonl"
    layout.append_row(path, row(1))
    with path.open("ab") as file:
        file.write(line)
    layout.append_row(path, row(2))
    with pytest.raises(InputError) as caught:
        layout.read_rows(path, DropCount)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert why in str(caught.value)
    assert (caught.value.path, caught.value.line) == (path, 2)


@pytest.mark.parametrize("written", [0, 5])
def test_a_row_that_does_not_fit_on_the_disk_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    path = tmp_path / "rows.jsonl"
    layout.append_row(path, row(1))

    def full(handle: int) -> None:
        # What a write that was cut short has left of the row, as far as others can see.
        os.ftruncate(handle, os.fstat(handle).st_size - written)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"rows\.jsonl could not be written: No space left"):
        layout.append_row(path, row(2))
    monkeypatch.undo()
    assert layout.read_rows(path, DropCount) == [row(1)]
    layout.append_row(path, row(3))
    assert layout.read_rows(path, DropCount) == [row(1), row(3)]


def test_rows_of_a_killed_writer_are_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    killed(
        "for n in range(5):\n    layout.append_row(argv[0], DropCount(reason='r', count=n))\nos.kill(os.getpid(), 9)\n",
        path,
    )
    assert layout.read_rows(path, DropCount) == [row(n, "r") for n in range(5)]


# Records.


def test_a_record_that_cannot_be_read_is_told_with_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.json").write_text('{"reason": "x"}', encoding="utf-8")
    (tmp_path / "binary.json").write_bytes(b"\x89PNG\xff")
    (tmp_path / "empty.json").write_text("", encoding="utf-8")
    for name, why in (
        ("none.json", "no such file."),
        ("folder", "cannot be read: Is a directory."),
        ("bad.json", "count: Field required"),
        ("binary.json", "utf-8"),
        ("empty.json", "EOF while parsing"),
    ):
        with pytest.raises(InputError) as caught:
            layout.read_record(tmp_path / name, DropCount, hint="Do this.")
        assert caught.value.message.startswith(f"{tmp_path / name}: ")
        assert why in caught.value.message
        assert caught.value.hint == "Do this."


@pytest.mark.parametrize("read", [layout.read_rows, layout.read_record])
def test_a_folder_is_no_file(tmp_path: Path, read: Callable[[Path, type[DropCount]], object]) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read(tmp_path, DropCount)


def test_the_hash_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert layout.file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# Locks.


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a folder until it is told to go on."""
    process = child("with layout.lock(argv[0]):\n    print('held', flush=True)\n    sys.stdin.read()\n", folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_with_the_first_ones_id(tmp_path: Path) -> None:
    first = hold(tmp_path / "run")
    refused = pytest.raises(FolderError, match=f"run is in use by process {first.pid}\\.")
    with refused as caught, layout.lock(tmp_path / "run"):
        pytest.fail("two hold it")
    assert caught.value.hint == "Wait for it to end, or choose another folder."
    first.communicate("", timeout=60)
    assert first.returncode == 0
    with layout.lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_dead_holder_holds_nothing(tmp_path: Path, number: signal.Signals) -> None:
    first = hold(tmp_path)
    first.send_signal(number)
    first.communicate(timeout=60)
    assert first.returncode != 0
    with layout.lock(tmp_path):
        pass


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), layout.lock(tmp_path):
        raise ValueError("inside")
    # One holder in a process, too: two steps of one process must not write into one folder.
    refused = pytest.raises(FolderError, match=f"in use by process {os.getpid()}")
    with layout.lock(tmp_path), layout.lock(tmp_path / "below"), refused, layout.lock(tmp_path):
        pytest.fail("two hold it")


def test_a_file_is_no_folder_to_lock(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for folder, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        with pytest.raises(FolderError, match=f"cannot be used: {why}"), layout.lock(folder):
            pytest.fail("locked")


def test_a_disk_that_cannot_lock_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(_handle: int, _what: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(FolderError, match="cannot be used: No locks available"), layout.lock(tmp_path):
        pytest.fail("locked")


@pytest.mark.parametrize("opened", [layout.lock, layout.atomic_file, layout.atomic_folder])
def test_no_open_files_are_left(tmp_path: Path, opened: Callable[[Path], AbstractContextManager[object]]) -> None:
    def count() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    before = count()
    for _ in range(5):
        with pytest.raises(ValueError, match="x"), opened(tmp_path / "x"):
            raise ValueError("x")
    assert count() == before


# Disk and shipped files.


def test_too_little_disk_is_told_before_the_work(tmp_path: Path) -> None:
    layout.require_disk(tmp_path / "not" / "there" / "yet", 1, what="It")
    with pytest.raises(ResourceError) as caught:
        layout.require_disk(tmp_path / "not" / "there", 10**18, what="The fused model")
    assert caught.value.message.startswith(
        f"The fused model needs 1000000000.0 GB on the disk of {tmp_path / 'not' / 'there'}, and "
    )
    assert not (tmp_path / "not").exists()


def test_a_relative_folder_has_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layout.require_disk(Path("no") / "where", 1, what="It")


def test_shipped_data_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = layout.find_input(Path("data/prompts/coding.toml"))
    assert shipped == layout.bundled("prompts/coding.toml")
    assert shipped.is_file()
    own = tmp_path / "data" / "prompts" / "coding.toml"
    own.parent.mkdir(parents=True)
    own.touch()
    assert layout.find_input(Path("data/prompts/coding.toml")) == Path("data/prompts/coding.toml")


def test_what_is_not_shipped_is_left_as_it_is() -> None:
    for path in (Path("data/none.toml"), Path("prompts/coding.toml"), Path("/data/prompts/coding.toml"), Path("data")):
        assert layout.find_input(path) in (path, layout.bundled("."))
    assert layout.bundled("none.toml") is None


def test_a_home_is_found_and_an_unknown_one_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert layout.find_input(Path("~/x.txt")) == tmp_path / "x.txt"
    assert layout.find_input(Path("~nobody-of-this-name/x.txt")) == Path("~nobody-of-this-name/x.txt")


def test_the_cache_goes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLX_DISTILL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert layout.models_cache() == tmp_path / ".cache" / "mlx-distill"
    monkeypatch.setenv("XDG_CACHE_HOME", "/other")
    assert layout.models_cache() == Path("/other/mlx-distill")
    monkeypatch.setenv("MLX_DISTILL_CACHE", "~/models")
    assert layout.models_cache() == tmp_path / "models"


def test_no_two_files_of_a_folder_share_a_name(tmp_path: Path) -> None:
    for folder in (layout.DataFolder(tmp_path), layout.RunFolder(tmp_path), layout.ComparisonFolder(tmp_path)):
        paths = [getattr(folder, name) for name, value in vars(type(folder)).items() if isinstance(value, property)]
        assert len(paths) >= 3
        assert len({path.name for path in paths}) == len(paths)
        assert all(path.parent == tmp_path for path in paths)
