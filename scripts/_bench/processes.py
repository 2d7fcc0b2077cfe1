"""Run a process to its end, and say how long it took and how much memory it and its children held."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

#: Seconds between two looks at the memory. The kernel's own high-water mark misses nothing in between.
_INTERVAL = 0.25

#: Seconds that a process is given to end when asked.
_GRACE = 5.0


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        status: Exit status; minus the signal that killed it.
        seconds: From start to end.
        peak_bytes: Most memory held: the kernel's high-water mark of the resident set of the process, or, where that
            is more, the highest sum seen over the process and its children.
        processor_seconds: Time of all cores, of the process and its children.
    """

    status: int
    seconds: float
    peak_bytes: int
    processor_seconds: float
    log: Path

    @property
    def failure(self) -> str | None:
        """Why it failed, in one line; None if it did not."""
        if self.status == 0:
            return None
        how = f"killed by {signal.Signals(-self.status).name}" if self.status < 0 else f"exit status {self.status}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        # What follows the error is advice; where nothing is called one, the last line says most.
        telling = [line for line in lines if "error" in line.lower()] or lines
        return f"{how}: {telling[-1][:200]}" if telling else how


def end_on_signals() -> None:
    """Let the signals that end this process pass through its `finally` clauses, so that no child outlives it."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)


def run(command: Sequence[str | Path], *, log: Path, environment: Mapping[str, str | None]) -> Outcome:
    """Run a command to its end; what it prints goes to a file.

    Args:
        environment: Changes to this process's own; None removes a variable.
    """
    merged: dict[str, str | None] = {**os.environ, **environment}
    child: subprocess.Popen[bytes] | None = None
    start = time.monotonic()
    peak = 0
    try:
        with log.open("wb") as out:
            # A session of its own: the child can be ended with all that it started, and Ctrl-C comes here alone.
            child = subprocess.Popen(
                [str(part) for part in command],
                env={name: value for name, value in merged.items() if value is not None},
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        while True:
            peak = max(peak, _memory(child.pid))
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(_INTERVAL)
        seconds = time.monotonic() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if child is not None:
            _end(child)
    # Linux counts kilobytes, macOS bytes.
    high_water = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Outcome(child.returncode, seconds, max(peak, high_water), usage.ru_utime + usage.ru_stime, log)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what is left of the child's session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        deadline = time.monotonic() + _GRACE
        try:
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
        except (KeyboardInterrupt, SystemExit):
            # Asked again: no more grace.
            continue


def _memory(root: int) -> int:
    """Bytes resident in a process and all below it."""
    if sys.platform == "linux":
        return sum(_resident(pid) for pid in _tree(root))
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=False).stdout
    table = [tuple(map(int, line.split())) for line in listed.splitlines()]
    family, grown = {root}, 0
    while len(family) != grown:
        grown = len(family)
        family |= {pid for pid, parent, _ in table if parent in family}
    return sum(kilobytes * 1024 for pid, _, kilobytes in table if pid in family)


def _tree(root: int) -> Iterator[int]:
    yield root
    for task in _read_folder(Path(f"/proc/{root}/task")):
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue
        for child in children:
            yield from _tree(int(child))


def _read_folder(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
