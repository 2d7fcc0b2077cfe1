"""The doctor and MLX: a slow BLAS, an unused GPU, a library that kills its process."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys

import pytest

from mlx_distill.doctor import mlx as mlx_probe
from tests.doctor.calling import doctor, process


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac's BLAS is always fast")
def test_slow_blas_is_a_warning_with_the_command_that_mends_it() -> None:
    """The real command in a process of its own: MLX has its BLAS for as long as a process lives."""
    done = process("-m", "mlx_distill", "doctor", "--json", environment={**os.environ, "MLX_DISTILL_BLAS": "off"})
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["findings"]}
    if rows["MLX device"]["found"].startswith("GPU"):
        assert rows["BLAS"]["state"] == "ok"
        return
    assert rows["BLAS"]["state"] == "warning"
    assert "slow" in rows["BLAS"]["found"]
    assert rows["BLAS"]["remedy"] == "unset MLX_DISTILL_BLAS"
    assert re.fullmatch(r"[\d,]+ GFLOP/s in float32", rows["matmul"]["found"])
    assert "Measuring the speed of MLX" in done.stderr


@pytest.mark.parametrize(
    ("processor", "has", "expected"),
    [
        ("x86_64", None, "-m pip install .*ngsolve-openblas"),
        ("aarch64", None, "-m pip install .*cmeel-openblas"),
        ("x86_64", "0.3.33", "sudo apt install libopenblas0-pthread"),
        ("riscv64", None, "sudo apt install libopenblas0-pthread"),
    ],
)
def test_fast_blas_of_a_processor(
    monkeypatch: pytest.MonkeyPatch, processor: str, has: str | None, expected: str
) -> None:
    monkeypatch.delenv("MLX_DISTILL_BLAS", raising=False)
    monkeypatch.setattr(platform, "machine", lambda: processor)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(mlx_probe, "installed", lambda _: has)
    device, blas, matmul = mlx_probe.findings(mlx_probe.Told("CPU", False, "reference", False, 3.0))
    assert device.state == "ok"
    assert (blas.state, matmul.state) == ("warning", "warning")
    assert re.search(expected, blas.remedy or "")
    assert matmul.remedy == blas.remedy


def test_gpu_needs_no_blas() -> None:
    rows = mlx_probe.findings(mlx_probe.Told("GPU (Apple M4 Max)", True, "Accelerate", True, 14_321.4))
    assert [row.state for row in rows] == ["ok", "ok", "ok"]
    assert rows[2].found == "14,321 GFLOP/s in float32"
    assert [row.state for row in mlx_probe.findings(mlx_probe.Told("GPU", True, "reference", False, None))] == [
        "ok"
    ] * 2


def test_unused_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    device = mlx_probe.findings(mlx_probe.Told("CPU", False, "OpenBLAS", True, None))[0]
    assert device.state == "warning"
    assert "mlx[cuda13]" in (device.remedy or "")


@pytest.mark.parametrize(
    ("child", "expected"),
    [
        ("import os; os.abort()", "killed by SIGABRT"),
        ("raise ImportError('libcblas.so.3: no such file')", "does not load, ImportError: libcblas.so.3: no such file"),
        ("raise SystemExit(7)", "does not load, exit code 7"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_mlx_that_dies_is_a_row(monkeypatch: pytest.MonkeyPatch, child: str, expected: str) -> None:
    monkeypatch.setattr(mlx_probe, "_CHILD", child)
    monkeypatch.setattr(mlx_probe, "_SECONDS", 1.0)
    monkeypatch.delenv("MLX_DISTILL_BLAS", raising=False)
    result = doctor("--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    rows = {row["name"]: row for row in told["findings"]}
    assert (rows["MLX device"]["state"], rows["MLX device"]["found"]) == ("missing", expected)
    assert rows["MLX device"]["remedy"]
    assert rows["smollm2-135m"]  # What comes after was looked at all the same.
    assert doctor().stdout.splitlines()[-1] == "Not ready. Nothing works without: MLX device."


def test_the_doctor_itself_does_not_load_mlx() -> None:
    code = (
        "import sys; from mlx_distill.config import DoctorConfig; from mlx_distill.doctor.run import examine; "
        "examine(DoctorConfig(speed=False)); print([m for m in ('mlx', 'torch', 'anthropic') if m in sys.modules])"
    )
    assert process("-c", code, environment=dict(os.environ)).stdout.strip() == "[]"
