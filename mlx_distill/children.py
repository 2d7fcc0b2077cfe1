"""Processes of our own modules that end with the one that started them, however it ends.

The parent holds the child's standard input open: where it closes, the parent is gone. `run_module` is the parent's
side, `end_with_parent` the child's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

#: Seconds that a process is given to end when asked.
_GRACE = 5


def run_module(
    module: str,
    arguments: Sequence[str | Path] = (),
    *,
    log: Path,
    environment: Mapping[str, str],
    line: str | None = None,
    seconds: float | None = None,
) -> int:
    """Run `python -m MODULE` to its end, in a session of its own, of which nothing is left afterwards.

    Args:
        log: File that takes what it prints.
        environment: Added to this process's own.
        line: The first of its standard input, which stays open.
        seconds: That it may take; any time without it.

    Returns:
        Its exit status; of one that a signal ended, minus the signal's number.

    Raises:
        subprocess.TimeoutExpired: It took longer.
    """
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            if line is not None:
                assert child.stdin is not None
                # A child that is gone already says why by its status.
                with suppress(BrokenPipeError):
                    child.stdin.write(f"{line}\n".encode())
                    child.stdin.flush()
            return child.wait(seconds)
        finally:
            _end(child)


def end_with_parent() -> None:
    """End this process when the one that started it is gone: its end of our standard input closes."""

    def wait() -> None:
        # Not by way of `sys.stdin`, whose lock this thread would hold when Python ends.
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what is left of the child's session."""
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
            return
