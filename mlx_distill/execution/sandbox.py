"""The operating system's own sandbox around a program: Landlock and seccomp on Linux, Seatbelt on macOS.

It comes with the extra `sandbox` (the package nono-py). Inside it a program reads its own folder, the interpreter and
the system's libraries and tools, and nothing else; it writes its own folder alone, has no network, not even to this
machine, and on Linux reaches no process but its own. Programs that need more fail in it, though they may be right:
those that open ports, and those that use `multiprocessing`'s locks, which lie in shared memory.

Only Linux has been tried. On macOS the folders are those that nono's own policy says programs need; canaries, such as
those of `mlx_distill.quality.verify`, tell whether it holds there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_READ_ON_LINUX = (
    *("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64", "/usr/local/lib", "/nix/store"),
    *("/bin", "/usr/bin", "/usr/share/zoneinfo", "/usr/share/locale"),
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/ssl", "/dev/urandom", "/dev/random"),
)
_GROUPS_ON_MACOS = ("system_read_macos", "homebrew")
_SHARED_BYTES = 16 << 20
_WRITE = ("/dev/null", "/dev/zero", "/dev/full")


@dataclass(frozen=True)
class SandboxSupport:
    """Whether programs can be confined here.

    Attributes:
        mechanism: What confines them, such as "Landlock V6 and seccomp"; None where nothing does.
        problem: Why nothing does, in one sentence.
        installed: Whether the package is there.
        gaps: What a confined program can do all the same.
    """

    mechanism: str | None
    problem: str | None
    installed: bool
    gaps: tuple[str, ...] = ()


@cache
def sandbox_support() -> SandboxSupport:
    """What this machine offers. The kernel is asked; whether it keeps its word only a program can show."""
    if importlib.util.find_spec("nono_py") is None:
        return SandboxSupport(None, "The package nono-py is not installed.", installed=False)
    try:
        import nono_py
    except ImportError as error:
        return SandboxSupport(None, f"The package nono-py cannot be loaded: {error}.", installed=False)
    support = nono_py.support_info()
    if not support.is_supported:
        return SandboxSupport(None, f"This system has no sandbox: {support.details}.", installed=True)
    if sys.platform == "darwin":
        gaps = (
            "reading system folders, temporary folders and other volumes",
            "signals to the user's other processes",
            "Unix sockets with a path",
        )
        return SandboxSupport("Seatbelt", None, installed=True, gaps=gaps)
    if sys.platform != "linux":
        return SandboxSupport(None, f"No sandbox is known for {sys.platform}.", installed=True)
    try:
        abi = nono_py.detect_abi()
    except RuntimeError as error:
        return SandboxSupport(None, f"This kernel has no Landlock: {error}.", installed=True)
    missing = [] if abi.has_truncate else ["truncating the user's files"]
    missing += [] if abi.has_scoping else ["signals to the user's other processes"]
    gaps = (
        "seeing names, sizes and times of files",
        "changing modes and times of the user's files",
        "Unix sockets with a path",
        *missing,
    )
    return SandboxSupport(f"Landlock {abi.version} and seccomp", None, installed=True, gaps=gaps)


def interpreter(folder: str, driver: Path, *, sandbox: bool) -> list[str]:
    """The command that starts Python for a program, without its options.

    Args:
        folder: Where the program lies and may write.
        driver: The script that will run it.
        sandbox: Whether the process is confined first.
    """
    if not sandbox:
        return [sys.executable]
    # Not the link in a virtual environment: only the interpreter itself and its library are open to the program.
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    own = {sys.base_prefix, sys.base_exec_prefix, str(Path(python).parent), str(driver)}
    job = {
        "search": [path for path in sys.path if path],
        "read": [*sorted(own), *(_READ_ON_LINUX if sys.platform == "linux" else ())],
        "write": [folder, *_WRITE],
        "shared_bytes": _SHARED_BYTES,
        "groups": _GROUPS_ON_MACOS if sys.platform == "darwin" else (),
    }
    confine = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_HERE / "confine.py")]
    return [*confine, json.dumps(job), python]
