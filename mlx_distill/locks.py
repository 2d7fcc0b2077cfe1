"""Folders held against other processes. The operating system lets go of a lock when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mlx_distill.errors import FolderError, InUseError

_NAME = ".lock"


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; the operating system lets go of it if this one dies.

    Raises:
        FolderError: Another process holds it (names its process id), or it cannot be a folder of ours.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            owner = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise InUseError(
                f"{folder} is in use by process {owner}.", hint="Wait for it to end, or choose another folder."
            ) from None
        except OSError as error:
            raise FolderError(f"{folder} cannot be used: {error.strerror}.", hint="Choose another folder.") from None
        yield


def holder(folder: Path) -> int | None:
    """The process that holds a folder now; None where it is free, or where that cannot be told.

    Writes nothing, and is not in the way of a process that is about to take the lock: whether it is held is asked only
    where the process that wrote its id there still lives.
    """
    try:
        handle = os.open(folder / _NAME, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        process = int(os.read(handle, 32))
        if _lives(process):
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return process
    except (OSError, ValueError):
        return None
    finally:
        os.close(handle)
    return None


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # It is another user's.
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
