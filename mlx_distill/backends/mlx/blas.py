"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel is linked against the reference BLAS, some thirty times slower than the machine. The dynamic linker
resolves a symbol to the first library that offers it, so an OpenBLAS loaded globally before MLX takes the
reference's place. On a Mac MLX uses Accelerate and Metal, and nothing is done.

Two traps are handled here:

- OpenBLAS's wheels need a `libgfortran.so.5` that a bare machine lacks. MLX's wheel carries one, under a name that was
  made unique by the tool that packed it. The linker knows a loaded library by the name it states of itself
  (`DT_SONAME`), so a copy in memory that states its plain name again is all that OpenBLAS asks for.
- An OpenBLAS that was built for one processor kills the process with an illegal instruction on another. A library is
  used only if it picks its kernels at run time, or if this processor has what its one kernel needs.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

#: A path to a BLAS library to load, or "off".
VARIABLE = "MLX_DISTILL_BLAS"

#: What a kernel of a single-processor build needs, as `/proc/cpuinfo` names it.
_NEEDS = {"HASWELL": "avx2", "ZEN": "avx2", "SKYLAKEX": "avx512bw", "NEOVERSEN1": "asimddp", "NEOVERSEN2": "sve2"}

_loaded: str | None = None


def load() -> str | None:
    """Load OpenBLAS, once, if this is Linux and MLX is not there yet.

    Returns:
        Path of the library that MLX's matrix products now use; None for MLX's own.
    """
    global _loaded  # noqa: PLW0603 - a library is loaded into a process once
    choice = os.environ.get(VARIABLE, "")
    if _loaded is not None or sys.platform != "linux" or choice == "off" or "mlx.core" in sys.modules:
        return _loaded
    for path in [choice] if choice else _candidates():
        library = _open(path) or (_open(path) if _provide_gfortran() else None)
        if library is not None and _runs_here(library):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            _loaded = path
            break
    return _loaded


def loaded() -> str | None:
    """The library that `load` found, or None."""
    return _loaded


def describe() -> str:
    """The BLAS that MLX's CPU backend uses, in words."""
    if sys.platform == "darwin":
        return "Accelerate"
    if _loaded is None:
        return "reference BLAS of MLX's wheel (slow)"
    library = ctypes.CDLL(_loaded)
    return f"{' '.join(_config(library)[:2])}, {_text(library, 'openblas_get_corename')} kernels"


def _candidates() -> Iterator[str]:
    yield from map(str, _files_of("ngsolve-openblas", "libopenblas"))
    yield from map(str, _files_of("cmeel-openblas", "libopenblas.so"))
    # Last, as looking for it calls the linker.
    if system := ctypes.util.find_library("openblas"):
        yield system


def _files_of(package: str, prefix: str) -> list[Path]:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(f.locate())) for f in files if f.name.startswith(prefix)]


def _open(path: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(path)
    except OSError:
        return None


def _text(library: ctypes.CDLL, function: str) -> str:
    get = getattr(library, function, None)
    if get is None:
        return ""
    get.restype = ctypes.c_char_p
    return (get() or b"").decode(errors="replace")


def _config(library: ctypes.CDLL) -> list[str]:
    return _text(library, "openblas_get_config").split()


def _runs_here(library: ctypes.CDLL) -> bool:
    if "DYNAMIC_ARCH" in _config(library):
        return True
    need = _NEEDS.get(_text(library, "openblas_get_corename").upper())
    return need is not None and need in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()


def _provide_gfortran() -> bool:
    for library in _files_of("mlx-cpu", "libgfortran-"):
        content = library.read_bytes()
        packed, plain = library.name.encode() + b"\0", b"libgfortran.so.5\0"
        if content.count(packed) != 1:
            continue
        for needed in _files_of("mlx-cpu", "libquadmath-"):
            _open(str(needed))
        # The file must outlive the process's use of the library, so it is never closed.
        handle = os.memfd_create("libgfortran.so.5", os.MFD_CLOEXEC)
        with open(handle, "wb", closefd=False) as file:
            file.write(content.replace(packed, plain.ljust(len(packed), b"\0")))
        if _open(f"/proc/self/fd/{handle}") is not None:
            return True
    return False
