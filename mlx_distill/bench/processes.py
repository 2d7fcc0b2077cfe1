"""A process for each measurement, of which none is left when the bench ends, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from mlx_distill import layout
from mlx_distill.bench.records import Task, Timing, Turn

#: Seconds that a process is given to end when asked.
_GRACE = 5


def run_task(task: Task, number: int, folder: Path, *, seconds: float) -> Turn:
    """Do a task in a process of its own.

    Args:
        number: Of the turn.
        folder: For the files of this task alone.
        seconds: After which it is taken to hang.
    """
    backend = task.peer or str(task.config["backend"])
    folder.mkdir(parents=True)
    files = [folder / name for name in ("task.json", "result.json", "log.txt")]
    files[0].write_text(task.to_json(), encoding="utf-8")
    environment = {**os.environ, "MLX_DISTILL_BENCH_STARTED": str(time.time())}
    with files[2].open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "mlx_distill.bench.worker", *files[:2]],
            # Never written to: it closes with this process, and the child ends with it.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            return Turn(backend=backend, number=number, failure=f"not done after {seconds:.0f} s")
        finally:
            _end(child)
    if status != 0:
        return Turn(backend=backend, number=number, failure=_failure(status, files[2]))
    return Turn(backend=backend, number=number, timing=layout.read_record(files[1], Timing))


def _failure(status: int, log: Path) -> str:
    """Why a process failed, in a line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")
    telling = [line for line in lines if "error" in line.lower()] or lines[:1]
    return telling[-1][:300] if telling else f"exit status {status}"


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what is left of the child's session."""
    assert child.stdin is not None
    child.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
            return
