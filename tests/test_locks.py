"""Who holds a folder, asked by one who does not want it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_distill import layout, locks
from tests.children import child


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A folder that another process holds."""
    process = child(
        "with layout.lock(argv[0]):\n    print('held', flush=True)\n    sys.stdin.read()\n", tmp_path / "run"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "run", process
    process.kill()
    process.communicate()


def test_the_holder_is_named_until_it_dies(held: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, process = held
    assert locks.holder(folder) == process.pid
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert locks.holder(folder) is None


def test_one_may_ask_about_a_folder_that_one_holds(tmp_path: Path) -> None:
    with layout.lock(tmp_path):
        assert locks.holder(tmp_path) == os.getpid()
    assert locks.holder(tmp_path) is None


def test_asking_leaves_no_trace(tmp_path: Path) -> None:
    assert locks.holder(tmp_path) is None
    assert locks.holder(tmp_path / "nowhere") is None
    assert list(tmp_path.iterdir()) == []
    with layout.lock(tmp_path):
        before = (tmp_path / ".lock").stat()
        locks.holder(tmp_path)
        after = (tmp_path / ".lock").stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)


@pytest.mark.parametrize("content", [b"", b"x", b"0", b"-1", b"1e3", b"9" * 30, b"\xff", b"1"])
def test_a_lock_that_nobody_holds_has_no_holder_whatever_it_says(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    assert locks.holder(tmp_path) is None


def test_what_is_no_lock_has_no_holder(tmp_path: Path) -> None:
    (tmp_path / "folder" / ".lock").mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / ".lock")
    (tmp_path / "file").touch()
    for name in ("folder", "pipe", "file"):
        assert locks.holder(tmp_path / name) is None


def test_a_folder_can_be_taken_while_others_ask(tmp_path: Path) -> None:
    """The process that held it last is dead, so that those who ask take no lock themselves, not for a moment."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / ".lock").write_text(str(dead.pid), encoding="utf-8")
    asking = child(
        "from mlx_distill import locks\nprint('asking', flush=True)\nwhile True:\n    locks.holder(argv[0])\n", tmp_path
    )
    try:
        assert asking.stdout is not None
        assert asking.stdout.readline() == "asking\n"
        for _ in range(300):
            with layout.lock(tmp_path):
                (tmp_path / ".lock").write_text(str(dead.pid), encoding="utf-8")
    finally:
        asking.kill()
        asking.communicate()
