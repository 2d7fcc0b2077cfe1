"""What MLX computes on, and how much memory that took. The parts that only a Mac can show are all here."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_distill.backends.memory import MEMORY_SHARE, machine_bytes, resident_bytes, resident_peak_bytes
from mlx_distill.backends.mlx import allocator, blas
from mlx_distill.errors import MlxDistillError, ResourceError

#: Share of the GPU's recommended working set that MLX may keep wired, so that weights are not paged out.
_WIRED_SHARE = 0.9


def on_gpu() -> bool:
    """Whether MLX's default device is a GPU (Metal or CUDA)."""
    return bool(mx.default_device() == mx.gpu)


def describe_device() -> str:
    """What MLX computes on, in words."""
    if not on_gpu():
        return f"CPU ({platform.machine()}, {blas.describe()})"
    info = mx.device_info()
    return f"GPU ({info.get('device_name', 'unknown')})"


def prepare_memory() -> None:
    """On Metal, wire memory for the weights; elsewhere nothing is needed."""
    if mx.metal.is_available():
        limit = int(mx.device_info().get("max_recommended_working_set_size", 0) * _WIRED_SHARE)
        if limit:
            mx.set_wired_limit(limit)


def peak_memory_bytes() -> int:
    """Most memory held at once: MLX's own count on a GPU, the process's resident set on a CPU."""
    if on_gpu():
        return int(mx.get_peak_memory())
    return resident_peak_bytes()


def held_memory_bytes() -> int:
    """What is held now: MLX's arrays on a GPU, the process's resident set on a CPU."""
    if on_gpu():
        return int(mx.get_active_memory())
    allocator.give_back_freed_memory()
    return resident_bytes()


def available_memory_bytes() -> int:
    """What training may take where nobody says: what Metal recommends, or most of the machine's memory."""
    recommended = int(mx.device_info().get("max_recommended_working_set_size", 0)) if mx.metal.is_available() else 0
    return recommended or int(total_memory_bytes() * MEMORY_SHARE)


def limit_memory(size: int) -> None:
    """On a GPU, let MLX's cache of freed memory be emptied before more than this is held."""
    if on_gpu():
        mx.set_memory_limit(size)


@contextmanager
def explained_allocation(advice: str) -> Iterator[None]:
    """Turn a failed allocation into a ResourceError with this advice.

    MLX raises a RuntimeError that only its text tells apart: "[malloc] Unable to allocate", "[metal::malloc] Attempting
    to allocate", Metal's "Insufficient Memory" for a command buffer, and CUDA's "out of memory".
    """
    try:
        yield
    except MlxDistillError:
        # Explained already, perhaps further in.
        raise
    except MemoryError as error:
        raise ResourceError("The machine is out of memory.", hint=advice) from error
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in ("malloc]", "insufficient memory", "out of memory")):
            raise
        mx.clear_cache()
        raise ResourceError(f"The machine is out of memory: {error}", hint=advice) from error


def total_memory_bytes() -> int:
    """Memory that MLX's default device can use: the machine's, which on a Mac the GPU shares."""
    if on_gpu() and not mx.metal.is_available():
        info = mx.device_info()
        # CUDA's name for it, and Metal's.
        return int(info.get("total_memory") or info.get("memory_size") or machine_bytes())
    return machine_bytes()


def measure_matmul(size: int = 1024, *, seconds: float = 0.5) -> float:
    """Speed of a square matrix product on the default device.

    Args:
        size: Rows and columns.
        seconds: How long to repeat it; the fastest repeat counts.

    Returns:
        GFLOP/s in float32.
    """
    a = mx.random.normal((size, size))
    b = mx.random.normal((size, size))
    mx.eval(a, b, a @ b)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
