"""`train --backend torch`: the same loop, the same files, and runs that one backend begins and the other ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.errors import ConfigError, TrainingError
from mlx_distill.layout import RunFolder
from mlx_distill.training.run import train
from tests.training.runs import ROOT, AtStep, command, environment, make_data, metrics, outcome, settings


def interrupt() -> None:
    raise KeyboardInterrupt


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


def test_both_backends_make_the_same_run(tmp_path: Path, tiny_model: Path) -> None:
    data = make_data(tmp_path / "data")
    runs = {name: tmp_path / name for name in ("mlx", "torch")}
    for name, run in runs.items():
        record = train(settings(data, tiny_model, run, backend=name))
        assert record.backend == name
    assert losses(runs["torch"]) == pytest.approx(losses(runs["mlx"]), rel=1e-4)
    for one, other in zip(*(metrics(run) for run in runs.values()), strict=True):
        assert [one[key] for key in ("kind", "step", "target_tokens", "tokens", "token_accuracy")] == [
            other[key] for key in ("kind", "step", "target_tokens", "tokens", "token_accuracy")
        ]
    names = [sorted(path.relative_to(run).as_posix() for path in run.rglob("*")) for run in runs.values()]
    assert names[0] == names[1]


@pytest.mark.parametrize("begins", ["mlx", "torch"])
def test_one_backend_ends_what_the_other_began(tmp_path: Path, tiny_model: Path, begins: str) -> None:
    data = make_data(tmp_path / "data")
    ends = {"mlx": "torch", "torch": "mlx"}[begins]
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    train(settings(data, tiny_model, whole, backend=ends, checkpoint_every=1))
    with pytest.raises(KeyboardInterrupt):
        train(settings(data, tiny_model, mixed, backend=begins, checkpoint_every=1), AtStep(3, interrupt))
    record = train(settings(data, tiny_model, mixed, backend=ends, checkpoint_every=1))
    assert record.backend == ends
    assert losses(mixed) == pytest.approx(losses(whole), rel=1e-4)


def test_a_torch_run_resumes_to_the_bit(tmp_path: Path, tiny_model: Path) -> None:
    data = make_data(tmp_path / "data")
    chosen: dict[str, Any] = {"backend": "torch", "dropout": 0.2, "checkpoint_every": 1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(settings(data, tiny_model, whole, **chosen))
    with pytest.raises(KeyboardInterrupt):
        train(settings(data, tiny_model, cut, **chosen), AtStep(3, interrupt))
    train(settings(data, tiny_model, cut, **chosen))
    assert outcome(cut) == outcome(whole)


def test_device_is_a_setting_of_torch(tmp_path: Path, tiny_model: Path) -> None:
    data = make_data(tmp_path / "data")
    with pytest.raises(ConfigError, match="--backend torch"):
        train(settings(data, tiny_model, tmp_path / "run", device="cpu"))
    assert not RunFolder(tmp_path / "run").record.exists()


def test_without_torch_it_says_what_to_install(tmp_path: Path, tiny_model: Path) -> None:
    """In a process where it cannot be imported."""
    data = make_data(tmp_path / "data")
    line = command(settings(data, tiny_model, tmp_path / "run", backend="torch"))
    source = f"import sys; sys.modules['torch'] = None; sys.argv = {line[2:]!r}; sys.argv[0] = 'mlx-distill'\n"
    source += "from mlx_distill.cli.main import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", source], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "pip install 'mlx-distill[torch]'" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_diverging_torch_run_ends_like_any_other(tmp_path: Path, tiny_model: Path) -> None:
    data = make_data(tmp_path / "data")
    config = settings(data, tiny_model, tmp_path / "run", backend="torch", learning_rate=1e8, grad_clip=None, warmup=0)
    with pytest.raises(TrainingError, match="stands in"):
        train(config)
    assert json.loads(RunFolder(config.run).record.read_text())["status"] == "running"
