"""MLX: what it computes on, with which BLAS, and how fast.

It is looked at in a process of its own: a library that does not suit the processor kills the process that loads it,
and a driver may hang.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_distill.doctor.finding import Finding
from mlx_distill.doctor.machine import on_mac
from mlx_distill.doctor.packages import install, installed
from mlx_distill.progress import SILENT, Progress

_SECONDS = 60.0
#: GFLOP/s in float32: the reference BLAS reaches 2 to 6, a fast one on two cores 70 and more.
_SLOW = 20.0

#: The packages with a fast BLAS for Linux, by processor.
_BLAS_PACKAGES = {"x86_64": "ngsolve-openblas", "aarch64": "cmeel-openblas"}

_CHILD = """
import sys
sys.path.append(sys.argv[1])
from mlx_distill.doctor.mlx import tell
tell(speed=sys.argv[2] == "speed")
"""


@dataclass(frozen=True)
class Told:
    """What the child tells.

    Attributes:
        device: In words.
        gpu: Whether it is one.
        blas: That of the CPU, in words.
        fast_blas: Whether it is not the reference.
        gflops: Of a float32 matrix product; None where it was not measured.
    """

    device: str
    gpu: bool
    blas: str
    fast_blas: bool
    gflops: float | None


def tell(*, speed: bool) -> None:
    """Write what MLX is to standard output, as a line of JSON. What the child runs."""
    from mlx_distill.backends.mlx import blas, device

    told = Told(
        device=device.describe_device(),
        gpu=device.on_gpu(),
        blas=blas.describe(),
        fast_blas=on_mac() or blas.loaded() is not None,
        gflops=device.measure_matmul() if speed else None,
    )
    sys.stdout.write(json.dumps(asdict(told)) + "\n")


def mlx(*, speed: bool, progress: Progress = SILENT) -> list[Finding]:
    """Device, BLAS and, if asked for, speed."""
    # -P, and the end of the path: nothing in the current folder takes the place of a module.
    command = [sys.executable, "-P", "-c", _CHILD, str(Path(__file__).parents[2]), "speed" if speed else "look"]
    with progress.task("Measuring the speed of MLX" if speed else "Looking at MLX"):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return [_dead(f"no answer within {_SECONDS:g} s")]
    if done.returncode < 0:
        killed = f"killed by {signal.Signals(-done.returncode).name}"
        if platform.system() == "Linux" and os.environ.get("MLX_DISTILL_BLAS") != "off":
            return [_dead(killed, "export MLX_DISTILL_BLAS=off   (MLX's own BLAS: slow, but it runs everywhere)")]
        return [_dead(killed)]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [_dead(f"does not load, {reason}")]
    return findings(Told(**json.loads(done.stdout.splitlines()[-1])))


def findings(told: Told) -> list[Finding]:
    """The rows that follow from what MLX is."""
    rows = [_device(told)]
    slow_blas = not (told.gpu or told.fast_blas)
    faster = _faster_blas() if slow_blas else None
    rows.append(Finding("BLAS", "warning" if slow_blas else "ok", told.blas, faster))
    if told.gflops is not None:
        slow = told.gflops < _SLOW
        remedy = (faster or "Measure again when nothing else runs:  mlx-distill doctor") if slow else None
        rows.append(Finding("matmul", "warning" if slow else "ok", f"{told.gflops:,.0f} GFLOP/s in float32", remedy))
    return rows


def _device(told: Told) -> Finding:
    if not told.gpu and on_mac():
        remedy = "Run it on the Mac itself; a virtual machine may have no GPU."
        return Finding("MLX device", "warning", told.device, remedy, required=True)
    if not told.gpu and shutil.which("nvidia-smi"):
        found = f"{told.device}, though there is an NVIDIA GPU"
        return Finding("MLX device", "warning", found, install("mlx", extra="cuda13"), required=True)
    return Finding("MLX device", "ok", told.device, required=True)


def _dead(reason: str, remedy: str | None = None) -> Finding:
    return Finding("MLX device", "missing", reason, remedy or install("mlx", "--force-reinstall"), required=True)


def _faster_blas() -> str:
    if os.environ.get("MLX_DISTILL_BLAS"):
        return "unset MLX_DISTILL_BLAS"
    package = _BLAS_PACKAGES.get(platform.machine())
    if package and not installed(package):
        return install(package)
    return "sudo apt install libopenblas0-pthread   (or:  export MLX_DISTILL_BLAS=PATH of an OpenBLAS)"
