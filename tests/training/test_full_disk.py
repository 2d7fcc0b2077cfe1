"""A disk that fills up in the midst of training: one clear error, nothing lost, the same run once there is space."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from mlx_distill.backends.base import State
from mlx_distill.cli.main import main
from mlx_distill.config import TrainConfig
from mlx_distill.errors import ResourceError
from mlx_distill.layout import RunFolder
from mlx_distill.training.checkpoints import Cursor, newest, save
from mlx_distill.training.run import train
from tests.training.faults import SmallDisk, Writes, full_disk
from tests.training.runs import Recorder, command, make_data, outcome, settings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> TrainConfig:
    """Two steps with dropout, a checkpoint after each, and a validation between them."""
    data = make_data(tmp_path_factory.mktemp("disk") / "data", train=4, valid=2, test=1)
    chosen = {"dropout": 0.1, "batch_size": 2, "epochs": 1, "checkpoint_every": 1, "validate_every": 1}
    return settings(data, tiny_model, Path("unset"), **chosen)


@pytest.fixture(scope="module")
def whole(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(in_folder(base, run))
    return outcome(run)


def in_folder(config: TrainConfig, run: Path) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), "run": run})


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """While open, the system refuses to let a file of this process grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_whole(run: Path) -> None:
    """No half of a file is left: the adapter loads, every checkpoint is what its hash says, nothing temporary stays."""
    files = RunFolder(run)
    if files.adapter.exists():
        assert load_file(files.adapter)
    recorder = Recorder()
    newest(files.checkpoints, recorder)
    assert recorder.said == []
    assert [path for path in run.rglob(".*") if path.name != ".lock"] == []


@pytest.mark.slow
def test_a_disk_that_is_full_from_some_write_on_costs_no_more_than_a_stop(
    base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path, writes: Writes
) -> None:
    writes.mend()
    train(in_folder(base, tmp_path / "whole"))
    count = writes.count
    assert count > 30
    for at in range(1, count, 4):
        config = in_folder(base, tmp_path / f"run{at}")
        writes.fail_after(at, full_disk)
        with pytest.raises(ResourceError, match="could not be written: No space left"):
            train(config)
        writes.mend()
        check_whole(config.run)
        train(config)
        assert outcome(config.run) == whole, f"full at write {at}"


def test_a_disk_that_fills_again_and_again_is_made_good(
    base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path, writes: Writes
) -> None:
    """Each time a little later than where the attempt before ended."""
    config = in_folder(base, tmp_path / "run")
    attempts = 0
    for at in range(1, 200):
        writes.fail_after(at, full_disk)
        try:
            train(config)
            break
        except ResourceError:
            attempts += 1
            writes.mend()
            check_whole(config.run)
    assert attempts > 15
    assert outcome(config.run) == whole


def test_each_kind_of_file_may_be_the_one_that_does_not_fit(
    base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path
) -> None:
    """Refused by the system in the midst of a file, whichever library writes it."""
    sizes = {path.name: path.stat().st_size for path in base_files(base, tmp_path / "whole")}
    adapter, checkpoint = sizes["adapters.safetensors"], sizes["step-00000002.safetensors"]
    assert sizes["run.json"] < adapter < checkpoint
    limits = (
        (100, "run.json"),
        (adapter - 1, "adapters.safetensors"),
        (checkpoint - 1, r"step-0000000[12].safetensors"),
    )
    for size, name in limits:
        config = in_folder(base, tmp_path / f"run{size}")
        with files_up_to(size), pytest.raises(ResourceError, match=f"{name} could not be written") as caught:
            train(config)
        assert "too large" in str(caught.value).lower()
        check_whole(config.run)
        assert RunFolder(config.run).adapter.exists() == name.startswith("step")
        train(config)
        assert outcome(config.run) == whole


def base_files(base: TrainConfig, run: Path) -> list[Path]:
    train(in_folder(base, run))
    return [path for path in run.rglob("*") if path.is_file()]


def test_kept_rows_that_fill_the_disk_are_given_back_and_training_goes_on(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two epochs, so that rows are kept of the training, too; wherever the disk fills, it ends the same."""
    chosen = in_folder(base, tmp_path / "whole").model_copy(update={"epochs": 2, "prefix_cache": "disk"})
    with monkeypatch.context() as patch:
        roomy = SmallDisk(patch, 1 << 30)
        train(chosen)
    expected, kept = outcome(chosen.run), roomy.held()
    assert kept > 4096
    for size in (0, 100, kept // 2, kept - 1):
        config = in_folder(chosen, tmp_path / f"run{size}")
        with monkeypatch.context() as patch:
            disk = SmallDisk(patch, size)
            record = train(config)
        assert record.plan is not None and record.plan.prefix_cache == "disk"
        assert disk.refused == 1  # and nothing more is tried
        assert disk.held() == 0
        assert outcome(config.run) == expected


def test_the_command_says_it_in_a_sentence(base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path) -> None:
    config = in_folder(base, tmp_path / "run")
    with files_up_to(len(whole[0]) + 100):
        done = CliRunner().invoke(main, command(config)[3:])
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-2].startswith("Error: ")
    assert "step-00000001.safetensors could not be written: " in done.stderr.splitlines()[-2]
    assert done.stdout == ""
    assert RunFolder(config.run).adapter.exists()
    train(config)
    assert outcome(config.run) == whole


def test_a_checkpoint_that_does_not_fit_leaves_those_before_it(tmp_path: Path) -> None:
    def state(size: int) -> State:
        return State({"adapter.x": np.full(size, size, dtype=np.float32)})

    save(tmp_path, Cursor(step=1), state(100), keep=1)
    with files_up_to(3000), pytest.raises(ResourceError, match="step-00000002"):
        save(tmp_path, Cursor(step=2), state(1000), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    found = newest(tmp_path, Recorder())
    assert found is not None
    assert found[0].step == 1
    np.testing.assert_array_equal(found[1].arrays["adapter.x"], state(100).arrays["adapter.x"])
