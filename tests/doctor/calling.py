"""Ways to call the doctor."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from click.testing import CliRunner, Result

from mlx_distill.cli.main import main
from mlx_distill.config import DoctorConfig
from mlx_distill.doctor import run
from mlx_distill.doctor.finding import Finding

ROOT = Path(__file__).parents[2]


def doctor(*arguments: str) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(main, ["doctor", *arguments])


def process(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        encoding="utf-8",
    )


def found(name: str) -> Finding:
    """The one row of this name."""
    [finding] = [finding for finding in run.examine(DoctorConfig()) if finding.name == name]
    return finding


def disk_with(free: float) -> Callable[..., Any]:
    """A `shutil.disk_usage` of disks that all have this many bytes free."""
    return lambda _place: SimpleNamespace(free=int(free))
