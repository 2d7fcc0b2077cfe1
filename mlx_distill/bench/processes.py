"""A process for each measurement, of which none is left when the bench ends, however it ends."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from mlx_distill import layout
from mlx_distill.bench.records import Task, Timing, Turn
from mlx_distill.children import run_module


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
    environment = {"MLX_DISTILL_BENCH_STARTED": str(time.time())}
    try:
        status = run_module(
            "mlx_distill.bench.worker", files[:2], log=files[2], environment=environment, seconds=seconds
        )
    except subprocess.TimeoutExpired:
        return Turn(backend=backend, number=number, failure=f"not done after {seconds:.0f} s")
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
