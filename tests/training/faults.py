"""What goes wrong: durable writes from the n-th on, files that cannot be opened, full disks, wild learning rates."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.config import TrainConfig
from mlx_distill.training import loop


class PowerCut(BaseException):
    """Ends a run as a power cut does: nothing in the package may catch it."""


def full_disk() -> OSError:
    """What the system says then."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse(patch: pytest.MonkeyPatch, refused: Path, number: int) -> None:
    """Let the system refuse to open a file. Rights would not do: a test may run as root."""
    real = Path.open

    def opened(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == refused:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    patch.setattr(Path, "open", opened)


def wild_from(patch: pytest.MonkeyPatch, step: int, rate: float) -> None:
    """Let the learning rate leap after so many steps."""
    real = loop.learning_rate

    def leaping(config: TrainConfig, at: int, total: int) -> float:
        return real(config, at, total) if at < step else rate

    patch.setattr(loop, "learning_rate", leaping)


class SmallDisk:
    """Has room for so many bytes of files that have no name; of a write that does not fit, a part is written.

    Args:
        patch: Puts it in place.
        size: Of the disk.
    """

    def __init__(self, patch: pytest.MonkeyPatch, size: int) -> None:
        self.size, self.refused = size, 0
        self._files: list[int] = []
        real = tempfile.TemporaryFile
        outer = self

        class File:
            def __init__(self, *arguments: Any, **options: Any) -> None:
                self._file = real(*arguments, **options)
                # Its own handle: what it holds can be told after it is closed.
                outer._files.append(os.dup(self._file.fileno()))

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def write(self, content: Any) -> int:
                room = outer.size - self._file.tell()
                if room < len(content):
                    outer.refused += room <= 0
                    if room <= 0:
                        raise full_disk()
                return int(self._file.write(content[:room]))

        patch.setattr(tempfile, "TemporaryFile", File)

    def held(self) -> int:
        """Bytes on it."""
        return sum(os.fstat(file).st_size for file in self._files)


class Writes:
    """Counts durable writes, and lets them fail from some number on."""

    def __init__(self) -> None:
        self.count = 0
        self._limit: int | None = None
        self._make: Callable[[], BaseException] = PowerCut

    def fail_after(self, count: int, make: Callable[[], BaseException] = PowerCut) -> None:
        """Let so many more writes succeed, and then none."""
        self.count, self._limit, self._make = 0, count, make

    def mend(self) -> None:
        """Let all succeed again, and count from 0."""
        self.count, self._limit = 0, None

    def tick(self) -> None:
        """A write is about to be made."""
        self.count += 1
        if self._limit is not None and self.count > self._limit:
            raise self._make()


def cut_until_done(work: Callable[[], object], writes: Writes, allowed: Callable[[], int]) -> int:
    """Begin work again after each power cut, until it is done.

    Args:
        allowed: How many writes succeed before the next cut.

    Returns:
        How many cuts there were.
    """
    cuts = 0
    while True:
        writes.fail_after(allowed())
        try:
            work()
        except PowerCut:
            cuts += 1
        else:
            writes.mend()
            return cuts


@contextmanager
def watched_writes() -> Iterator[Writes]:
    """While open, every fsync, rename and new temporary file of this process is a durable write."""
    writes = Writes()

    def ticking(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            writes.tick()
            return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", ticking(os.fsync))
        patch.setattr(Path, "replace", ticking(Path.replace))
        patch.setattr(tempfile, "mkstemp", ticking(tempfile.mkstemp))
        try:
            yield writes
        finally:
            writes.mend()
