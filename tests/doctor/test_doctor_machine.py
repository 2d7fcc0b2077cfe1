"""The doctor and the machine: system, chip, memory, disks."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from mlx_distill.doctor import machine, run
from mlx_distill.doctor import mlx as mlx_probe
from mlx_distill.doctor.finding import Finding
from tests.doctor.calling import disk_with, doctor


def test_chip_by_cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    cases = {
        "processor\t: 0\nmodel name\t: AMD EPYC\nmodel\t\t: 1\n": "AMD EPYC",
        "processor\t: 0\nCPU part\t: 0xd0b\n\nModel\t\t: Raspberry Pi 5 Model B\n": "Raspberry Pi 5 Model B",
        "processor\t: 0\nCPU implementer\t: 0x41\n": "aarch64",
        "": "aarch64",
    }
    for text, name in cases.items():
        (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
        assert machine.chip()[0].found == f"{name}, {os.cpu_count()} cores"


@pytest.mark.parametrize(
    ("limit", "expected", "state"),
    [
        ("max", "16.4 GB, 8.2 GB available", "ok"),
        ("9223372036854771712", "16.4 GB, 8.2 GB available", "ok"),
        ("2000000000", "2.0 GB, 2.0 GB available", "warning"),
    ],
)
def test_memory_within_the_limits_of_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, expected: str, state: str
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\nHugePages_Total: 0\n")
    (tmp_path / "max").write_text(limit + "\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", (tmp_path / "max", tmp_path / "none"))
    [finding] = machine.memory()
    assert (finding.found, finding.state) == (expected, state)


def _mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, kind: str) -> None:
    """A Mac's two programs, as far as they are asked."""
    for name, lines in {
        "sysctl": 'case "$2" in hw.memsize) echo 68719476736;; machdep.cpu.brand_string) echo "Apple M4 Max";; esac',
        "vm_stat": "cat <<END\nMach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                             1000000.\nPages active:                           1500000.\n"
        "Pages inactive:                          500000.\nPages speculative:                       250000.\n"
        'Pages wired down:                        300000.\n"Translation faults":                 99999999.\nEND',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(machine, "_SYSCTL", str(tmp_path / "sysctl"))
    monkeypatch.setattr(machine, "_VM_STAT", str(tmp_path / "vm_stat"))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: kind)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.1", ("", "", ""), kind))


def test_mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _mac(monkeypatch, tmp_path, kind="arm64")
    assert machine.system() == [Finding("system", "ok", "macOS 26.1, arm64", required=True)]
    assert machine.chip()[0].found.startswith("Apple M4 Max, ")
    assert machine.memory()[0].found == "68.7 GB, 28.7 GB available"  # 1,750,000 pages
    without_gpu = mlx_probe.findings(mlx_probe.Told("CPU (arm64, Accelerate)", False, "Accelerate", True, 900.0))
    assert [finding.state for finding in without_gpu] == ["warning", "ok", "ok"]


def test_intel_mac_is_not_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _mac(monkeypatch, tmp_path, kind="x86_64")
    assert run.lacking(machine.system()) == ["system"]


@pytest.mark.parametrize(("free", "state", "code"), [(0, "missing", 1), (5e9, "warning", 0), (500e9, "ok", 0)])
def test_disk(quick: None, monkeypatch: pytest.MonkeyPatch, free: float, state: str, code: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", disk_with(free))
    result = doctor("--json")
    assert result.exit_code == code
    told = json.loads(result.stdout)
    rows = [row for row in told["findings"] if row["name"] == "disk"]
    assert {row["state"] for row in rows} == {state}
    assert rows[0]["found"].startswith(f"{free / 1e9:.1f} GB free for data/, adapters/, visuals/")
    assert told["ready"] is (code == 0)
    if state != "ok":
        assert "Free some space" in rows[0]["remedy"]


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").touch()  # A file in its place stops even root.
    finding = machine.disks()[0]
    assert (finding.state, finding.found, finding.required) == ("missing", "data/ cannot be written", True)


def test_each_disk_has_its_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_DISTILL_CACHE", "/dev/not/there")  # /dev is a disk of its own on macOS and Linux.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setattr(shutil, "disk_usage", disk_with(5e9))
    here, there = machine.disks()
    assert here.found == f"5.0 GB free for data/, adapters/, visuals/, {tmp_path / 'hub'}/"
    assert there.found == "5.0 GB free for /dev/not/there/"
    assert "MLX_DISTILL_CACHE" in (there.remedy or "")
