"""Runs as a script: confines its own process by the operating system, then becomes the program given to it.

    python confine.py JOB PROGRAM ARGUMENT...

JOB is JSON, as `mlx_distill.execution.sandbox` makes it. What the process may not do from here on, neither the program
nor anything that it starts can do. The only package used is nono-py, found where the calling process finds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

# From linux/sched.h and sys/mount.h.
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
_SHARED_MEMORY = "/dev/shm"


def own_shared_memory(most_bytes: int) -> bool:
    """On Linux: put an empty shared memory in the place of everybody's, for this process and what it starts.

    `multiprocessing` keeps its locks there. It takes a mount namespace, and for anyone but root a user namespace,
    which some systems do not grant.

    Returns:
        Whether it was granted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWNS if user == 0 else _CLONE_NEWNS | _CLONE_NEWUSER) != 0:
        return False
    if user != 0:
        with contextlib.suppress(OSError):
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    if libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        return False
    options = f"size={most_bytes},mode=1777".encode()
    place = _SHARED_MEMORY.encode()
    return bool(libc.mount(b"tmpfs", place, b"tmpfs", _MS_NOSUID | _MS_NODEV, options) == 0)


def confine(job: dict[str, Any]) -> None:
    """Give up everything but what the job lists, for good.

    Args:
        job: `search` (folders of packages), `read` and `write` (folders and files; those missing are passed over),
            `groups` (names in nono's own policy), `shared_bytes` (size of a shared memory of its own).

    Raises:
        RuntimeError: The operating system refuses.
    """
    # First: a process with several threads gets no namespace.
    own_memory = sys.platform == "linux" and own_shared_memory(job["shared_bytes"])
    sys.path += job["search"]
    import nono_py

    allowed = nono_py.CapabilitySet()
    if job["groups"]:
        nono_py.load_embedded_policy().resolve_groups(job["groups"], allowed)
    for paths, mode in ((job["read"], nono_py.AccessMode.READ), (job["write"], nono_py.AccessMode.READ_WRITE)):
        for path in paths:
            if Path(path).is_dir():
                allowed.allow_path(path, mode)
            elif Path(path).exists():
                allowed.allow_file(path, mode)
    if own_memory:
        allowed.allow_path(_SHARED_MEMORY, nono_py.AccessMode.READ_WRITE)
    allowed.block_network()
    if sys.platform == "linux":
        # Landlock alone leaves everything but TCP open; the filter of system calls closes it.
        nono_py.apply_seccomp(allowed)
    else:
        nono_py.apply(allowed)


def main() -> None:
    """Confine this process and become the program."""
    _, job, *command = sys.argv
    confine(json.loads(job))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
