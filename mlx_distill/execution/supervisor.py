"""Runs as a script between the calling process and the program: watches the program, ends it, and reports.

It holds the limits that the kernel does not: wall time, output, and the memory, number and disk use of all the
program's processes together. It ends when the program ends, when a limit is passed, or when the calling process
is gone, and leaves no process of the program behind: on Linux it is the "subreaper" to which orphans are given.

Standard library only, and nothing of this package: the interpreter is started without site-packages.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_READ_BYTES = 1 << 16
_REPORT_BYTES = 1 << 16
_MOST_FILES = 20_000
_LOOK_SECONDS = 0.05
_DISK_SECONDS = 0.25
_ENDING_SECONDS = 5.0
_HAS_PROC = Path("/proc/self/stat").exists()

# From linux/prctl.h.
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38


@dataclass(frozen=True)
class Process:
    """One living process; those that ended and wait to be reaped are left out.

    Attributes:
        resident_bytes: Memory it occupies, shared pages included.
        tasks: Its threads on Linux, 1 elsewhere.
    """

    pid: int
    parent: int
    group: int
    resident_bytes: int
    tasks: int


def running() -> Iterator[Process]:
    """All living processes that can be seen: through /proc on Linux, through `ps` elsewhere."""
    return _from_proc() if _HAS_PROC else _from_ps()


def _from_proc() -> Iterator[Process]:
    for name in os.listdir("/proc"):  # noqa: PTH208 - half the time of Path.iterdir, many times a second
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123 - likewise
                # The command stands in brackets and may itself hold blanks and brackets.
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if len(fields) > 21 and fields[0] not in (b"Z", b"X"):
            yield Process(int(name), int(fields[1]), int(fields[2]), int(fields[21]) * _PAGE_BYTES, int(fields[17]))


def _from_ps() -> Iterator[Process]:
    columns = ["/bin/ps", "-axo", "pid=,ppid=,pgid=,rss=,stat="]
    with subprocess.Popen(columns, stdout=subprocess.PIPE, text=True) as listing:
        output, _ = listing.communicate()
    for line in output.splitlines():
        pid, parent, group, kilobytes, state = line.split()[:5]
        if int(pid) != listing.pid and not state.startswith("Z"):
            yield Process(int(pid), int(parent), int(group), int(kilobytes) * 1024, 1)


def descendants(root: int, groups: set[int]) -> list[Process]:
    """The living processes below one, without itself.

    Args:
        groups: Process groups seen in that family so far: they tell an orphan that was given to process 1.
    """
    children: dict[int, list[Process]] = {}
    for process in running():
        children.setdefault(process.parent, []).append(process)
    found: dict[int, Process] = {}
    pending = [*children.get(root, ()), *(p for p in children.get(1, ()) if p.group in groups)]
    while pending:
        process = pending.pop()
        if process.pid not in found and process.pid != root:
            found[process.pid] = process
            pending += children.get(process.pid, ())
    return list(found.values())


class Tail:
    """The last bytes of a stream, and how many there were."""

    def __init__(self, keep: int) -> None:
        self._keep, self._last, self.total = keep, bytearray(), 0

    def add(self, chunk: bytes) -> None:
        """Take in what was read."""
        self.total += len(chunk)
        self._last += chunk
        del self._last[: -self._keep]

    def text(self) -> str:
        """As UTF-8, with a replacement character for what is not."""
        return self._last.decode(errors="replace")


class Supervisor:
    """One program from its start to its end.

    Args:
        job: What `mlx_distill.execution.run` describes.
        alive: A pipe that closes when the calling process ends.
    """

    def __init__(self, job: dict[str, Any], alive: int) -> None:
        self._job, self._alive = job, alive
        self._folder: str = job["folder"]
        self._limits: dict[str, float] = job["watch"]
        self._out, self._err = Tail(job["tail_bytes"]), Tail(job["tail_bytes"])
        self._events = Tail(_REPORT_BYTES)
        self._groups: set[int] = set()
        self._status: int | None = None
        self._cpu_seconds = 0.0
        self._peak_bytes = 0
        self._look_at = self._disk_at = 0.0

    def run(self) -> dict[str, Any]:
        """Run the program and say how it ended: the facts, not yet what they mean."""
        begun = time.monotonic()
        self._start()
        try:
            ended = self._watch(begun + self._limits["seconds"])
        finally:
            self._end_all()
        seconds = time.monotonic() - begun
        self._drain()
        if self._printed_too_much():  # what it wrote just before its end counts too
            ended = "output"
        return {
            "ended": ended,
            "status": self._status,
            "stdout": self._out.text(),
            "stderr": self._err.text(),
            "output_bytes": self._out.total + self._err.total,
            "events": self._own_events(),
            "seconds": seconds,
            "cpu_seconds": self._cpu_seconds,
            "peak_memory_bytes": self._peak_bytes,
        }

    def _start(self) -> None:
        report, report_end = os.pipe()
        # Its bytes decide the order of sets: without a fixed seed a wrong program may pass now and fail later.
        self._program = subprocess.Popen(
            [*self._job["interpreter"], "-s", "-P", "-S", "-B", "-X", "utf8", self._job["driver"]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._folder,
            env={**self._job["environment"], "PYTHONHASHSEED": "0"},
            start_new_session=True,
            pass_fds=[report_end],
        )
        self._groups.add(self._program.pid)
        sys.stdout.write(json.dumps({"group": self._program.pid}) + "\n")
        sys.stdout.flush()
        os.close(report_end)
        assert self._program.stdin and self._program.stdout and self._program.stderr
        with contextlib.suppress(BrokenPipeError):
            self._program.stdin.write(json.dumps({**self._job["program"], "report": report_end}).encode())
        with contextlib.suppress(BrokenPipeError):
            self._program.stdin.close()
        self._streams = {
            self._program.stdout.fileno(): self._out,
            self._program.stderr.fileno(): self._err,
            report: self._events,
        }
        for handle in self._streams:
            os.set_blocking(handle, False)

    def _watch(self, deadline: float) -> str:
        """Wait for the program's end or for a reason to end it: "exit", a limit's name, or "abandoned"."""
        wake, wake_end = os.pipe()
        os.set_blocking(wake_end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            for handle in (wake, self._alive, *self._streams):
                selector.register(handle, selectors.EVENT_READ)
            while (ended := self._check(time.monotonic(), deadline)) is None:
                pause = max(0.0, min(self._look_at, deadline) - time.monotonic())
                for handle in [key.fd for key, _ in selector.select(pause)]:
                    if handle == self._alive:
                        return "abandoned"
                    if handle == wake:
                        os.read(wake, _READ_BYTES)
                    elif not self._read(handle):
                        selector.unregister(handle)
        return ended

    def _check(self, now: float, deadline: float) -> str | None:
        """Whether the program has ended or has to be ended, and why; the costly looks are taken now and then."""
        self._reap()
        if self._status is not None:
            return "exit"
        if now >= deadline:
            return "timeout"
        if self._printed_too_much():
            return "output"
        if now >= self._disk_at:
            self._disk_at = now + _DISK_SECONDS
            if disk_bytes(self._folder, self._limits["disk_bytes"]) > self._limits["disk_bytes"]:
                return "output"
        if now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            return self._passed_limit()
        return None

    def _printed_too_much(self) -> bool:
        return self._out.total + self._err.total > self._limits["output_bytes"]

    def _read(self, handle: int) -> bool:
        """Take in what a stream has ready; False at its end."""
        try:
            chunk = os.read(handle, _READ_BYTES)
        except BlockingIOError:
            return True
        self._streams[handle].add(chunk)
        return bool(chunk)

    def _drain(self) -> None:
        """Take in what the pipes still hold; nobody is left to fill them."""
        for handle, tail in self._streams.items():
            with contextlib.suppress(BlockingIOError):
                while chunk := os.read(handle, _READ_BYTES):
                    tail.add(chunk)

    def _passed_limit(self) -> str | None:
        family = descendants(os.getpid(), self._groups)
        self._groups |= {process.group for process in family} - {os.getpgrp()}
        resident = sum(process.resident_bytes for process in family)
        self._peak_bytes = max(self._peak_bytes, resident)
        if len(family) > self._limits["processes"]:
            return "processes"
        return "memory" if resident > self._limits["memory_bytes"] else None

    def _reap(self) -> bool:
        """Collect children that ended; True while any is left."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            self._cpu_seconds += usage.ru_utime + usage.ru_stime
            if pid == self._program.pid:
                self._status = os.waitstatus_to_exitcode(status)
                self._program.returncode = self._status
                unit = 1 if sys.platform == "darwin" else 1024
                self._peak_bytes = max(self._peak_bytes, usage.ru_maxrss * unit)

    def _end_all(self) -> None:
        """Kill whatever is left of the program, until nothing is."""
        give_up = time.monotonic() + _ENDING_SECONDS
        while time.monotonic() < give_up:
            if self._status is None:  # its leader is not reaped, so that the group's number is still its own
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._program.pid, signal.SIGKILL)
            family = descendants(os.getpid(), self._groups)
            for process in family:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, signal.SIGKILL)
            if not self._reap() and not family:
                return
            time.sleep(0.002)

    def _own_events(self) -> list[dict[str, Any]]:
        events = []
        for line in self._events.text().splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and event.get("token") == self._job["program"]["token"]:
                events.append(event)
        return events


def disk_bytes(folder: str, enough: float) -> int:
    """Bytes of the files in a folder; counting ends beyond `enough`, and with too many files at once.

    A folder that cannot be read counts nothing.
    """
    total = files = 0
    pending = [folder]
    while pending and total <= enough:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                files += 1
                if files > _MOST_FILES:
                    return int(enough) + 1
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def remove_folder(folder: str) -> None:
    """Delete a folder with all that is in it, however deep, unreadable or long its names."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        subprocess.run(["/bin/chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["/bin/rm", "-rf", folder], stderr=subprocess.DEVNULL, check=False)


def adopt_orphans() -> None:
    """On Linux: get the orphans among our descendants, and let no setuid program raise anyone's rights."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def main() -> None:
    """Read the job from standard input, do it, write the outcome to standard output."""
    job = json.load(sys.stdin)
    adopt_orphans()
    try:
        outcome = Supervisor(job, job["alive"]).run()
        # Before the folder is removed: that can take long where a program nested folders in one another.
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(json.dumps(outcome) + "\n")
            sys.stdout.flush()
    finally:
        remove_folder(job["folder"])


if __name__ == "__main__":
    main()
