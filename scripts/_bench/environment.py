"""TRL and what it needs, in a virtual environment of its own, made on first use."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from _bench.processes import run

#: What is compared with. transformers is the version that this project uses.
PINNED = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "trl==1.16.0",
    "peft==0.21.2",
    "datasets==5.2.0",
    "accelerate==1.15.0",
)


class EnvironmentFailedError(Exception):
    """The environment could not be made; says why."""


def python_of(folder: Path) -> Path:
    """The interpreter of the environment, which is made if it is not there or is of other versions.

    Raises:
        EnvironmentFailedError: pip could not install it, or would have installed torch for a GPU.
    """
    python = folder / "bin" / "python"
    stamp = folder / ".installed"
    wanted = "\n".join(PINNED)
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    sys.stderr.write(f"Installing TRL into {folder}\n")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        log, report = Path(name) / "log", Path(name) / "report.json"
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", folder],
            # A dry run first: torch for CUDA is gigabytes of libraries that a CPU does not use.
            [*pip, "--dry-run", "--report", report, *PINNED],
            [*pip, *PINNED],
        ):
            failure = run(command, log=log, environment={"PYTHONPATH": None}).failure
            if failure is not None:
                raise EnvironmentFailedError(f"TRL was not installed: {failure}")
            if report.exists():
                _refuse_cuda(report)
    stamp.write_text(wanted)
    return python


def _refuse_cuda(report: Path) -> None:
    names = [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]]
    if any(name.startswith("nvidia-") for name in names):
        raise EnvironmentFailedError("pip would install torch for CUDA; let PIP_EXTRA_INDEX_URL name its CPU builds")
