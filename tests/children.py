"""Python processes of their own, some of which kill themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def child(source: str, *arguments: Path) -> subprocess.Popen[str]:
    """A Python of its own that has `layout`, `os`, `signal` and `Path`; arguments as `argv`."""
    head = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom mlx_distill import layout\n"
        "from mlx_distill.manifest import DropCount\nargv = [Path(a) for a in sys.argv[1:]]\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + source, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_to_end(handle: int) -> bytes:
    """All that is written to a terminal until its other end is closed; closes this one."""
    out = b""
    try:
        while block := os.read(handle, 65536):
            out += block
    except OSError:  # the other end is closed
        pass
    os.close(handle)
    return out


def killed(source: str, *arguments: Path) -> None:
    """Run a source that kills itself by SIGKILL."""
    process = child(source, *arguments)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
