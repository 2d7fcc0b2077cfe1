"""Checkpoints that were saved and cannot be gone on from: it is said, and nothing is written over."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_distill.cli.main import main
from mlx_distill.config import TrainConfig
from mlx_distill.errors import OccupiedError, TrainingError
from mlx_distill.layout import RunFolder
from mlx_distill.training.run import train
from tests.training.faults import refuse
from tests.training.runs import AtStep, Recorder, command, contents, make_data, outcome, settings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> TrainConfig:
    data = make_data(tmp_path_factory.mktemp("lost") / "data")
    return settings(data, tiny_model, Path("unset"), dropout=0.1)


@pytest.fixture(scope="module")
def whole(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(in_folder(base, run))
    return outcome(run)


def in_folder(config: TrainConfig, run: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), "run": run, **changes})


@pytest.fixture
def interrupted(base: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A run that stopped after its sixth of eight steps, with checkpoints of steps 4 and 6."""
    config = in_folder(base, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, AtStep(6, lambda: signal.raise_signal(signal.SIGINT)))
    return config


def damage(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-9])


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


LOSSES: list[tuple[Callable[[Path], None], str]] = [
    (damage, "All checkpoints in .*run/checkpoints are damaged"),
    (empty, "run has metrics of 6 steps, but no checkpoint is left"),
    (remove, "run has metrics of 6 steps, but no checkpoint is left"),
]


@pytest.mark.parametrize(("lose", "said"), LOSSES)
def test_a_run_does_not_start_over_in_silence(
    interrupted: TrainConfig, whole: tuple[Any, ...], lose: Callable[[Path], None], said: str
) -> None:
    """Its adapter and metrics are what is left of it, to the bit; as told, they can be given up."""
    folder = RunFolder(interrupted.run)
    lose(folder.checkpoints)
    before = contents(interrupted.run)
    for changes in ({}, {"finish": True}, {"checkpoint_every": 100}):
        with pytest.raises(TrainingError, match=said) as caught:
            train(in_folder(interrupted, interrupted.run, **changes))
        assert "another --run" in str(caught.value)
        assert "remove its checkpoints and metrics.jsonl" in str(caught.value)
        assert contents(interrupted.run) == before
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    folder.metrics.unlink()
    train(interrupted)
    assert outcome(interrupted.run) == whole


def test_a_finished_run_without_adapter_and_checkpoints_is_not_trained_again_in_silence(
    base: TrainConfig, tmp_path: Path
) -> None:
    """Of one epoch alone: no step of it came after its only checkpoint, but its test did."""
    config = in_folder(base, tmp_path / "run", epochs=1, checkpoint_every=100)
    train(config)
    shutil.rmtree(RunFolder(config.run).checkpoints)
    RunFolder(config.run).adapter.unlink()
    before = contents(config.run)
    with pytest.raises(TrainingError, match="metrics of 4 steps, but no checkpoint is left"):
        train(config)
    assert contents(config.run) == before


def test_checkpoints_that_nothing_describes_are_not_gone_on_with(
    interrupted: TrainConfig, whole: tuple[Any, ...]
) -> None:
    """They may be of other settings."""
    folder = RunFolder(interrupted.run)
    folder.record.unlink()
    folder.adapter.unlink()
    before = contents(interrupted.run)
    for changes in ({}, {"learning_rate": 1e-4}):
        with pytest.raises(OccupiedError, match=r"checkpoints of a run that no run\.json describes"):
            train(in_folder(interrupted, interrupted.run, **changes))
        assert contents(interrupted.run) == before
    shutil.rmtree(folder.checkpoints)
    folder.metrics.unlink()
    train(interrupted)
    assert outcome(interrupted.run) == whole


@pytest.mark.parametrize("step", [1, 3, 4])
@pytest.mark.parametrize("every", [1, 100])
def test_a_run_killed_before_its_first_checkpoint_starts_anew_by_itself(
    base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path, step: int, every: int
) -> None:
    """Also where checkpoints come faster from now on."""

    def die() -> None:
        raise KeyboardInterrupt

    config = in_folder(base, tmp_path / "run", checkpoint_every=100)
    with pytest.raises(KeyboardInterrupt):
        train(config, AtStep(step, die))
    assert not list(RunFolder(config.run).checkpoints.glob("*"))
    watcher = AtStep(-1, None)
    train(in_folder(config, config.run, checkpoint_every=every), watcher)
    assert watcher.steps == 8
    assert outcome(config.run) == whole


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(
    interrupted: TrainConfig, whole: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    newest = max(RunFolder(interrupted.run).checkpoints.iterdir())
    before = contents(interrupted.run)
    with monkeypatch.context() as patch:
        refuse(patch, newest, number)
        with pytest.raises(TrainingError, match=f"{newest} cannot be read: {os.strerror(number)}") as caught:
            train(interrupted)
    assert "the same command goes on" in str(caught.value)
    assert contents(interrupted.run) == before
    recorder = Recorder()
    train(interrupted, recorder)
    assert "Going on from step 6 of 8." in recorder.said
    assert outcome(interrupted.run) == whole


def test_the_command_says_it_in_two_sentences(interrupted: TrainConfig) -> None:
    damage(RunFolder(interrupted.run).checkpoints)
    before = contents(interrupted.run)
    done = CliRunner().invoke(main, command(interrupted)[3:])
    assert done.exit_code == 1
    assert "Traceback" not in done.stderr
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("Error: All checkpoints in ")
    assert hint.startswith("  Its adapter and metrics are as they were. Choose another --run folder;")
    assert contents(interrupted.run) == before
