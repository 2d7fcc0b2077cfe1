"""What the tests of the doctor share."""

from __future__ import annotations

import shutil

import pytest

from mlx_distill.doctor import machine, run
from mlx_distill.doctor.finding import Finding
from tests.doctor.calling import disk_with


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MLX's process, and without what differs from one moment to the next."""
    monkeypatch.setattr(run, "mlx", lambda **_: [Finding("MLX device", "ok", "some", required=True)])
    monkeypatch.setattr(machine, "memory", lambda: [Finding("memory", "ok", "some")])
    monkeypatch.setattr(shutil, "disk_usage", disk_with(500e9))
