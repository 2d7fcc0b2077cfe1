"""Durable writes that fail: the power goes or the disk is full, at the n-th write and at all after it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class PowerCut(BaseException):
    """Ends a run as a power cut does: nothing in the package may catch it."""


def full_disk() -> OSError:
    """What the system says then."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
