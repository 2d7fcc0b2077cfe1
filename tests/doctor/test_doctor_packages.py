"""The doctor and what is installed."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_distill.config import DoctorConfig
from mlx_distill.doctor import mlx as mlx_probe
from mlx_distill.doctor import packages, run
from mlx_distill.doctor.finding import Finding
from tests.doctor.calling import ROOT


@pytest.fixture
def distribution(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Installed before all others: this package with its requirements, an old transformers, a broken torch."""
    for name, version, lines in (
        (
            "mlx-distill",
            "0.1.0",
            [
                "Requires-Dist: mlx<0.33,>=0.32.4; sys_platform == 'none'",
                "Requires-Dist: mlx[cpu]<0.33,>=0.32.4",
                "Requires-Dist: transformers<6,>=5.23",
                "Requires-Dist: huggingface-hub<3,>=2.4",
                "Requires-Dist: torch>99; extra == 'dev'",
            ],
        ),
        ("transformers", "4.57.0", []),
        ("huggingface_hub", "2.4.0", []),
        ("torch", None, []),
    ):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        if version:
            text = "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines, ""])
            (folder / "METADATA").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield


@pytest.mark.usefixtures("distribution")
def test_versions_are_held_against_what_this_package_states() -> None:
    [old] = packages.package("transformers")
    assert (old.state, old.found) == ("warning", "4.57.0, but made for <6,>=5.23")
    assert old.remedy == packages.install("transformers")
    assert (old.remedy or "").endswith("-m pip install 'transformers<6,>=5.23'")
    assert packages.package("huggingface_hub") == [Finding("huggingface_hub", "ok", "2.4.0", required=True)]


@pytest.mark.usefixtures("distribution")
def test_requirement_of_this_platform_is_installed() -> None:
    assert packages.install("mlx").endswith("-m pip install 'mlx[cpu]<0.33,>=0.32.4'")
    assert packages.install("mlx", extra="cuda13").endswith("'mlx[cuda13]<0.33,>=0.32.4'")
    assert packages.install("torch").endswith("-m pip install torch")  # that of an extra is not ours


def test_missing_packages(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed", lambda _: None)
    rows = {finding.name: finding for finding in run.examine(DoctorConfig())}
    assert all(rows[name].state == "missing" and rows[name].remedy for name in packages.PACKAGES)
    assert run.lacking(rows.values()) == ["mlx", "mlx-lm", "transformers", "huggingface_hub"]
    assert (rows["pip"].remedy or "").endswith("-m ensurepip")


def test_half_removed_package_is_missing(distribution: None) -> None:
    [torch] = packages.package("torch")
    assert (torch.state, torch.required) == ("missing", False)


def test_what_is_looked_for_is_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in project["dependencies"]}
    looked_for = {name.replace("-", "_") for name in packages.PACKAGES if name not in ("pip", "torch")}
    assert looked_for <= declared
    assert {name.replace("-", "_") for name in mlx_probe._BLAS_PACKAGES.values()} <= declared
