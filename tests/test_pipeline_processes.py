"""Walks in processes of their own: interrupted or killed in training, the same command ends with the same adapter."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_distill.layout import RunFolder
from tests.training.runs import environment
from tests.walking import ALL, make_project

EPOCHS = "train.epochs=6"


def start(project: Path, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_distill", "run", "recipe.toml", "--set", f"name={name}", "--set", EPOCHS, "--json"],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(process: subprocess.Popen[str], run: RunFolder, count: int) -> None:
    """Until a walk has written so many rows of metrics."""
    deadline = time.monotonic() + 60
    while not run.metrics.exists() or run.metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finished(process: subprocess.Popen[str]) -> dict[str, str]:
    """What a walk that must succeed did, by step."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return {step["step"]: step["status"] for step in json.loads(out)["steps"]}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A project with a walk named `whole` that nothing disturbed."""
    folder = make_project(tmp_path_factory.mktemp("processes"), tiny_model)
    assert set(finished(start(folder, "whole")).values()) == {"done"}
    return folder


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_walk_stopped_in_training_goes_on(project: Path, number: signal.Signals) -> None:
    name = number.name
    run = RunFolder(project / "adapters" / name)
    process = start(project, name)
    wait_for_steps(process, run, 8)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert out == ""
    assert "Traceback" not in err
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130, err
        assert "Interrupted. Every finished step stands" in err
        assert "the same command goes on from there." in err
    assert json.loads(run.record.read_text(encoding="utf-8"))["status"] == "running"
    assert not (project / "visuals" / name).exists()

    again = start(project, name)
    statuses = finished(again)
    assert [step for step in ALL if statuses[step] == "unchanged"] == ["prompts", "collect"]
    assert run.adapter.read_bytes() == RunFolder(project / "adapters" / "whole").adapter.read_bytes()
    assert list(project.rglob("*.before-*")) == []


def test_a_second_walk_at_once_is_refused_with_the_first_ones_id(project: Path) -> None:
    first = start(project, "twice")
    wait_for_steps(first, RunFolder(project / "adapters" / "twice"), 1)
    second = start(project, "twice")
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (1, "")
    assert f"in use by process {first.pid}" in err
    first.kill()
    first.communicate()
