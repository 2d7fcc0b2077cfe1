"""What the system says of this process's memory and of the machine's."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

#: Share of a machine's memory that training may take where nothing recommends another.
MEMORY_SHARE = 0.75


def resident_peak_bytes() -> int:
    """Most that this process has had in memory at once."""
    if sys.platform == "linux":
        # Not `getrusage`, which on Linux begins with what the process had before it became this program: its parent's.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_bytes() -> int:
    """What this process has in memory now; on a Mac, which does not tell in the standard library, its peak."""
    if sys.platform != "linux":
        return resident_peak_bytes()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
