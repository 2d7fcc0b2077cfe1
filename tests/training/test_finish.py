"""`train --finish`: a run that was interrupted, or went wrong, ends with the best adapter that it has."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_distill.backends.base import NO_TOKENS
from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.batches import in_order
from mlx_distill.cli.main import main
from mlx_distill.config import FuseConfig, TrainConfig
from mlx_distill.dataset import load_splits
from mlx_distill.errors import InputError, TrainingError
from mlx_distill.fuse import fuse
from mlx_distill.layout import RunFolder
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.run_list import list_runs
from mlx_distill.runs import read_run
from mlx_distill.training.run import train
from tests.training.faults import wild_from
from tests.training.runs import AtStep, Recorder, command, contents, make_data, metrics, settings

STEPS, PER_EPOCH = 8, 4  # 10 rows in batches of 3, two epochs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> TrainConfig:
    data = make_data(tmp_path_factory.mktemp("finish") / "data")
    return settings(data, tiny_model, Path("unset"), dropout=0.1)


def changed(config: TrainConfig, run: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), "run": run, **changes})


def finishing(config: TrainConfig) -> TrainConfig:
    return changed(config, config.run, finish=True)


def interrupt(config: TrainConfig, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config, AtStep(step, lambda: signal.raise_signal(signal.SIGINT)))


def loss(config: TrainConfig, split: str) -> float:
    """Of the adapter in the run's folder, by a student made anew."""
    student = MlxStudent(Path(config.model), config)
    student.load_adapter(config.run)
    rows = load_splits(config.data, load_tokenizer(Path(config.model)), max_length=config.max_length)[split].rows
    return sum((student.evaluate(batch) for batch in in_order(rows, config.batch_size)), NO_TOKENS).loss


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_an_interrupted_run_ends_where_it_was(base: TrainConfig, tmp_path: Path, step: int) -> None:
    """With the best of all that was validated, where it stands among it, and with figures of its own."""
    config = changed(base, tmp_path / "run")
    interrupt(config, step)
    before = metrics(config.run)
    with pytest.raises(InputError, match="not finished") as caught:
        read_run(config.run)
    assert "--finish" in str(caught.value)
    watcher = AtStep(-1, None)
    record = train(finishing(config), watcher)
    assert watcher.steps == 0
    assert f"Ends at step {step} of {STEPS}." in watcher.said
    assert read_run(config.run) == record
    assert (record.status, record.steps, record.epochs) == ("finished", step, step // PER_EPOCH)
    assert (record.cut_short, record.stopped_early) == (step < STEPS, False)
    rows = metrics(config.run)
    assert rows[: len(before)] == before
    assert "step" not in {row["kind"] for row in rows[len(before) :]}
    valid = [row for row in rows if row["kind"] == "valid"]
    best = min(valid, key=lambda row: (row["loss"], row["step"]))
    assert valid[-1]["step"] == step
    assert (record.best_step, record.valid_loss, record.token_accuracy) == (
        best["step"],
        best["loss"],
        best["token_accuracy"],
    )
    assert record.train_loss == [row["loss"] for row in rows if row["kind"] == "train"][-1]
    assert rows[-1]["kind"] == "test"
    assert record.test_loss == rows[-1]["loss"] == pytest.approx(loss(config, "test"), rel=1e-6)
    assert loss(config, "valid") == pytest.approx(record.valid_loss, rel=1e-6)
    assert "finish" not in record.config
    (entry,) = list_runs(config.run)
    assert (entry.status, entry.step, entry.stopped_early) == ("finished", step, step < STEPS)


def test_it_can_be_fused_and_the_same_command_says_that_it_is_finished(base: TrainConfig, tmp_path: Path) -> None:
    config = changed(base, tmp_path / "run", learning_rate=0.02)
    interrupt(config, 6)
    record = train(finishing(config))
    fuse(FuseConfig(run=config.run))
    assert (RunFolder(config.run).fused / "model.safetensors").is_file()
    before = contents(config.run)
    for again in (finishing(config), config):
        recorder = Recorder()
        assert train(again, recorder).best_step == record.best_step
        assert any("finished already" in line for line in recorder.said)
        assert contents(config.run) == before


def test_its_adapter_comes_back_like_any_other(base: TrainConfig, tmp_path: Path) -> None:
    config = changed(base, tmp_path / "run")
    interrupt(config, 6)
    train(finishing(config))
    adapter, rows = RunFolder(config.run).adapter.read_bytes(), metrics(config.run)
    RunFolder(config.run).adapter.unlink()
    train(finishing(config))
    assert (RunFolder(config.run).adapter.read_bytes(), metrics(config.run)) == (adapter, rows)


@pytest.mark.parametrize("every", [1, 100])
def test_a_run_whose_loss_is_no_number_ends_with_what_it_had_before(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Also where the newest checkpoint holds what went wrong: it is looked at, and not taken."""
    wild_from(monkeypatch, 5, 1e30)
    config = changed(base, tmp_path / "run", checkpoint_every=every, grad_clip=None)
    with pytest.raises(TrainingError, match="not finite at step 7") as caught:
        train(config)
    assert "the adapter of step 4: the same command with --finish" in str(caught.value)
    adapter = RunFolder(config.run).adapter.read_bytes()
    with pytest.raises(TrainingError, match="not finite at step 7"):
        train(config)
    record = train(finishing(config))
    assert RunFolder(config.run).adapter.read_bytes() == adapter
    assert (record.best_step, record.steps, record.cut_short) == (4, 6 if every == 1 else 4, True)
    fuse(FuseConfig(run=config.run))


# Nothing to validate on


def test_without_validation_it_is_the_adapter_of_the_last_whole_epoch(
    base: TrainConfig, tiny_model: Path, tmp_path: Path
) -> None:
    data = make_data(tmp_path / "data", valid=0)
    for step in (4, 6):
        config = changed(base, tmp_path / f"run{step}", data=data)
        interrupt(config, step)
        record = train(finishing(config))
        assert (record.best_step, record.steps, record.valid_loss) == (4, step, None)
        assert record.test_loss == pytest.approx(loss(config, "test"), rel=1e-6)
    assert RunFolder(tmp_path / "run4").adapter.read_bytes() == RunFolder(tmp_path / "run6").adapter.read_bytes()


def test_without_validation_there_is_none_in_the_first_epoch(base: TrainConfig, tmp_path: Path) -> None:
    config = changed(base, tmp_path / "run", data=make_data(tmp_path / "data", valid=0))
    interrupt(config, 3)
    with pytest.raises(TrainingError, match="No adapter is kept yet at step 3") as caught:
        train(finishing(config))
    assert "Leave --finish out" in str(caught.value)
    assert train(config).steps == STEPS


# Nothing to finish


@pytest.mark.parametrize("begun", [False, True])
def test_without_a_checkpoint_there_is_nothing_to_finish(base: TrainConfig, tmp_path: Path, begun: bool) -> None:
    config = changed(base, tmp_path / "run", checkpoint_every=100)

    def die() -> None:
        raise KeyboardInterrupt

    if begun:
        with pytest.raises(KeyboardInterrupt):
            train(config, AtStep(2, die))
    before = contents(config.run)
    with pytest.raises(TrainingError, match="run has no checkpoint: there is nothing yet to finish with") as caught:
        train(finishing(config))
    assert "Leave --finish out" in str(caught.value)
    assert contents(config.run) == before
    assert train(config).steps == STEPS


# On the command line


def test_the_command_tells_how_it_ended(base: TrainConfig, tmp_path: Path) -> None:
    config = changed(base, tmp_path / "run")
    interrupt(config, 6)
    other = shutil.copytree(config.run, tmp_path / "other")
    as_json = CliRunner().invoke(main, command(finishing(config))[3:])
    assert as_json.exit_code == 0, as_json.stderr
    found = json.loads(as_json.stdout)
    assert (found["steps"], found["cut_short"], found["stopped_early"]) == (6, True, False)
    words = [word for word in command(finishing(changed(config, other)))[3:] if word != "--json"]
    told = CliRunner().invoke(main, words)
    assert told.exit_code == 0, told.stderr
    assert "cut short        after 6 steps, by --finish" in told.stdout
