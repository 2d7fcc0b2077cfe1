"""The best adapter is in the checkpoint: a run that goes on has it, whatever has become of its files since."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.backends.base import State
from mlx_distill.config import TrainConfig
from mlx_distill.errors import TrainingError
from mlx_distill.layout import RunFolder, read_record
from mlx_distill.run_records import RunRecord
from mlx_distill.training.checkpoints import newest, save
from mlx_distill.training.run import train
from tests.training.runs import AtStep, Recorder, contents, make_data, metrics, outcome, settings

STEPS = 8  # 10 rows in batches of 3, two epochs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> TrainConfig:
    data = make_data(tmp_path_factory.mktemp("kept") / "data")
    return settings(data, tiny_model, Path("unset"), dropout=0.1)


@pytest.fixture(scope="module")
def whole(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted. Do not write into it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(in_folder(base, run))
    return run


def in_folder(config: TrainConfig, run: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), "run": run, **changes})


def stopping(step: int) -> AtStep:
    return AtStep(step, lambda: signal.raise_signal(signal.SIGINT))


@pytest.fixture
def interrupted(base: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A run that stopped after its sixth of eight steps; the best adapter is that of the first epoch's end."""
    config = in_folder(base, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, stopping(6))
    return config


def files(run: Path) -> tuple[bytes, bytes]:
    return RunFolder(run).adapter.read_bytes(), RunFolder(run).adapter_config.read_bytes()


def remove(run: Path, whole: Path) -> None:
    RunFolder(run).adapter.unlink()


def remove_both(run: Path, whole: Path) -> None:
    remove(run, whole)
    RunFolder(run).adapter_config.unlink()


def damage(run: Path, whole: Path) -> None:
    RunFolder(run).adapter.write_bytes(RunFolder(run).adapter.read_bytes()[:-9])
    RunFolder(run).adapter_config.write_text("{", encoding="utf-8")


def replace(run: Path, whole: Path) -> None:
    """As a kill leaves it between the best adapter of a later step and that step's checkpoint."""
    shutil.copyfile(RunFolder(whole).adapter, RunFolder(run).adapter)


@pytest.mark.parametrize("happens", [remove, remove_both, damage, replace])
def test_it_is_that_of_the_checkpoint_again(
    interrupted: TrainConfig, whole: Path, happens: Callable[[Path, Path], None]
) -> None:
    before = files(interrupted.run)
    happens(interrupted.run, whole)
    assert not RunFolder(interrupted.run).adapter.exists() or files(interrupted.run) != before
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, stopping(1))  # within the second epoch: none has been written since
    assert files(interrupted.run) == before
    happens(interrupted.run, whole)
    train(interrupted)
    assert outcome(interrupted.run) == outcome(whole)
    assert files(interrupted.run) == files(whole)


@pytest.mark.parametrize("test", [0, 2])
def test_a_finished_run_gets_its_adapter_back(base: TrainConfig, tmp_path: Path, test: int) -> None:
    """Nothing is trained again for it, and nothing else changes."""
    data = make_data(tmp_path / "data", test=test)
    config = in_folder(base, tmp_path / "run", data=data)
    train(config)
    expected, rows, before = outcome(config.run), metrics(config.run), files(config.run)
    remove_both(config.run, config.run)
    watcher = AtStep(-1, None)
    assert train(config, watcher).status == "finished"
    assert watcher.steps == 0
    assert files(config.run) == before
    assert metrics(config.run) == rows
    assert outcome(config.run) == expected


def test_a_best_found_within_an_epoch_is_in_a_checkpoint_at_once(base: TrainConfig, tmp_path: Path) -> None:
    """Whatever ends the run then, and however seldom checkpoints are due."""
    for step in range(2, STEPS + 1):
        config = in_folder(base, tmp_path / f"run{step}", validate_every=1, checkpoint_every=100)

        def die() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(config, AtStep(step, die))  # in the midst of things: nothing is saved any more
        valid = [row for row in metrics(config.run) if row["kind"] == "valid"]
        best = min(valid, key=lambda row: (row["loss"], row["step"]))
        assert best["step"] > 0
        found = newest(RunFolder(config.run).checkpoints, Recorder())
        assert found is not None
        cursor, state = found
        assert (cursor.best_step, cursor.best_loss) == (best["step"], best["loss"])
        kept = state.group("kept")
        assert (kept["adapters.safetensors"].tobytes(), kept["adapter_config.json"].tobytes()) == files(config.run)


def test_a_file_that_goes_while_training_ends_it_before_it_is_missed(
    base: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    config = in_folder(base, tmp_path / "run", checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"adapters\.safetensors, .* cannot be read any more") as caught:
        train(config, AtStep(3, RunFolder(config.run).adapter.unlink))
    assert "The same command goes on" in str(caught.value)
    train(config)
    assert outcome(config.run) == outcome(whole)


# Checkpoints of an earlier version


@pytest.fixture
def old(interrupted: TrainConfig) -> TrainConfig:
    """The interrupted run, its checkpoints without the adapter."""
    folder = RunFolder(interrupted.run).checkpoints
    found = newest(folder, Recorder())
    assert found is not None
    arrays = {name: value for name, value in found[1].arrays.items() if not name.startswith("kept.")}
    assert len(arrays) == len(found[1].arrays) - 2
    save(folder, found[0], State(arrays), keep=1)
    return interrupted


def test_an_old_checkpoint_goes_on(old: TrainConfig, whole: Path) -> None:
    train(old)
    assert outcome(old.run) == outcome(whole)


def test_an_old_checkpoint_without_its_adapter_is_told_and_left(old: TrainConfig, whole: Path) -> None:
    RunFolder(old.run).adapter.unlink()
    before = contents(old.run)
    with pytest.raises(TrainingError, match=r"adapters\.safetensors, the best adapter, is gone") as caught:
        train(old)
    assert "--run" in str(caught.value)
    assert contents(old.run) == before
    assert read_record(RunFolder(old.run).record, RunRecord).status == "running"
