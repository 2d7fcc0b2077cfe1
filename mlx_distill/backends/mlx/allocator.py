"""Keep glibc from giving large blocks back to the system after every operation.

MLX's CPU backend takes each array's memory from malloc and frees it when the array is gone. Above 32 MB glibc maps
such a block afresh each time, and the kernel fills it with zeros page by page, which takes some six times as long as
an addition of the same size. Here freed memory stays with the process and is used again.
"""

from __future__ import annotations

import ctypes
import sys

#: Options of `mallopt(3)`.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Ask glibc to serve large blocks from its heap, and to keep what is freed.

    Returns:
        Whether this C library took the request.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 * 2**20}
    return all(mallopt(option, value) for option, value in settings.items())


def give_back_freed_memory() -> None:
    """Return to the system what is free in the heap, so that the resident set is what is held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
