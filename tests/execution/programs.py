"""What the tests of running programs share."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from textwrap import dedent

from mlx_distill.execution import Execution, Limits, run_python

QUICK = Limits(seconds=2.0, cpu_seconds=2, memory_bytes=256 << 20, processes=16)


def run(source: str, limits: Limits = QUICK) -> Execution:
    """Run a program, given indented as it stands in a test."""
    return run_python(dedent(source), limits=limits)


def processes_that_mention(folder: Path) -> list[str]:
    """Processes whose environment, command or working folder names a folder."""
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        listing = subprocess.run(
            ["/bin/ps", "-axwwE", "-o", "pid=,command="], capture_output=True, text=True, check=True
        )
        return [line for line in listing.stdout.splitlines() if str(folder) in line]
    found = []
    for process in proc.glob("[0-9]*"):
        try:
            known = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            known += str((process / "cwd").readlink()).encode()
        except OSError:
            continue
        if str(folder).encode() in known and int(process.name) != os.getpid():
            found.append(process.name)
    return found
