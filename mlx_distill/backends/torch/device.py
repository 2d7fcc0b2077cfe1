"""What torch computes on, and how much memory that takes. All that MPS needs to be careful of is here.

- A model is loaded whole and moved as one: `device_map="auto"` splits it between MPS and the CPU.
- MPS keeps every buffer for the shape it was made for: few widths keep its pool small (`width_on`), and it is emptied
  when it is large (`trim`).
- No operation used here lacks a kernel, so PYTORCH_ENABLE_MPS_FALLBACK stays unset: it would hide a step on the CPU.
- Work is queued: `wait` before a clock is read.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch

from mlx_distill.backends.memory import MEMORY_SHARE, machine_bytes, resident_bytes, resident_peak_bytes
from mlx_distill.errors import ConfigError

#: MPS: widths are rounded up to a multiple of this.
_MPS_WIDTH = 64

#: MPS: its pool is emptied from this share of what Metal recommends.
_MPS_POOL_SHARE = 0.7

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device of this name; for "auto" MPS, else CUDA, else the CPU.

    Raises:
        ConfigError: The machine, or this build of torch, has no such device.
    """
    there = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_there in there.items() if is_there))
    if not there[name]:
        raise ConfigError(
            f"device = {name}: torch {torch.__version__} finds none on this machine.",
            hint=f"Choose {' or '.join(kind for kind, is_there in there.items() if is_there)}, or auto.",
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of the frozen weights; for "auto" bfloat16 on a GPU, and float32 on a CPU, which computes little else fast."""
    if name != "auto":
        return _DTYPES[name]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def describe_device(device: torch.device) -> str:
    """What torch computes on, in words."""
    if device.type == "cuda":
        return f"GPU ({torch.cuda.get_device_name(device)}, torch {torch.__version__})"
    if device.type == "mps":
        return f"GPU (MPS, torch {torch.__version__})"
    return f"CPU ({platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads)"


def width_on(device: torch.device, width: int) -> int:
    """What a batch of this width is padded to."""
    return -(-width // _MPS_WIDTH) * _MPS_WIDTH if device.type == "mps" else width


def wait(device: torch.device) -> None:
    """Until all that was queued is done."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "cuda":
        torch.cuda.synchronize(device)


def trim(device: torch.device) -> None:
    """Empty MPS's pool of freed buffers before it crowds out what is in use."""
    if device.type != "mps":
        return
    if torch.mps.driver_allocated_memory() > _MPS_POOL_SHARE * torch.mps.recommended_max_memory():
        torch.mps.empty_cache()


def held_bytes(device: torch.device) -> int:
    """What is held now."""
    if device.type == "mps":
        return int(torch.mps.current_allocated_memory())
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident_bytes()


def available_bytes(device: torch.device) -> int:
    """What training may take where nobody says."""
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else machine_bytes()
    return int(total * MEMORY_SHARE)


def grown_by(device: torch.device, work: Callable[[], None]) -> int:
    """How far the memory of a GPU grows, at its most, while something is computed."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        wait(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    torch.mps.empty_cache()
    before = torch.mps.driver_allocated_memory()
    work()
    wait(device)
    # Freed buffers stay in the pool: what it has grown by is the peak.
    return int(torch.mps.driver_allocated_memory() - before)


def random_of(device: torch.device) -> Any:
    """The module that holds a GPU's random state."""
    return torch.mps if device.type == "mps" else torch.cuda


class Peak:
    """The most memory held at once, as far as the device tells.

    MPS tells what is held now, not what was: its driver's pool, which grows and is seldom emptied, is looked at after
    each step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = 0

    def look(self) -> None:
        """Note what is held now."""
        if self._device.type == "mps":
            self._pool = max(self._pool, int(torch.mps.driver_allocated_memory()))

    def bytes(self) -> int:
        """The most so far."""
        self.look()
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return self._pool if self._device.type == "mps" else resident_peak_bytes()
