"""What a process says of its memory is its own, whoever started it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from mlx_distill.backends.memory import machine_bytes, resident_bytes, resident_peak_bytes

MB = 10**6


def test_a_small_child_of_a_large_process_is_small() -> None:
    held = np.ones(400 * MB, dtype=np.uint8)
    source = "from mlx_distill.backends.memory import resident_peak_bytes as p; print(p())"
    found = int(subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout)
    assert resident_peak_bytes() >= held.nbytes
    assert found < 200 * MB


def test_the_peak_stays_when_memory_is_given_back() -> None:
    held = np.ones(300 * MB, dtype=np.uint8)
    now, peak = resident_bytes(), resident_peak_bytes()
    assert held.nbytes <= now <= peak + MB
    del held
    assert peak <= resident_peak_bytes() <= machine_bytes()
