"""Validations within an epoch, and a run that ends when they no longer improve."""

from __future__ import annotations

import json
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.cli.train import summarise
from mlx_distill.config import TrainConfig
from mlx_distill.errors import ConfigError
from mlx_distill.layout import RunFolder
from mlx_distill.training.run import train
from tests.training.faults import Writes, cut_until_done
from tests.training.runs import AtStep, Recorder, chat, make_data, metrics, outcome, settings

STEPS, PER_EPOCH = 12, 4  # 10 rows in batches of 3, three epochs

#: Rows of which the training rows teach nothing: their loss rises in the end.
FOREIGN = {"messages": [{"role": "user", "content": "Ω"}, {"role": "assistant", "content": "§ ¶ Ж щ" * 5}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> TrainConfig:
    """A run whose validation loss falls, rises, and falls again."""
    data = make_data(tmp_path_factory.mktemp("early") / "data")
    rows = [FOREIGN, chat(20), chat(21)]
    (data / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chosen = {
        "epochs": 3,
        "learning_rate": 0.05,
        "layers": "all",
        "schedule": "constant",
        "warmup": 0.0,
        "dropout": 0.1,
    }
    return settings(data, tiny_model, Path("unset"), **chosen)


@pytest.fixture(scope="module")
def long(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of a run that validates after every step, to its end."""
    run = tmp_path_factory.mktemp("long") / "run"
    train(changed(base, run, validate_every=1))
    return metrics(run)


def changed(config: TrainConfig, run: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), "run": run, **changes})


def stops_at(rows: list[dict[str, Any]], patience: int, due: set[int]) -> int | None:
    """The step at which patience runs out before the last one, told from the losses alone."""
    best, stale = float("inf"), 0
    for row in (row for row in rows if row["kind"] == "valid" and row["step"] in due):
        stale = 0 if row["loss"] < best else stale + 1
        best = min(best, row["loss"])
        if stale == patience and row["step"] < STEPS:
            return int(row["step"])
    return None


def due_steps(every: int | None) -> set[int]:
    ends = set(range(0, STEPS + 1, PER_EPOCH))
    return ends if every is None else ends | set(range(0, STEPS, every))


# Validations


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 8, 11, 100])
def test_validations_come_when_they_are_due_and_once(
    base: TrainConfig, long: list[dict[str, Any]], tmp_path: Path, every: int
) -> None:
    """And they change nothing: every row is that of the run which validates always."""
    record = train(changed(base, tmp_path / "run", validate_every=every))
    rows = metrics(tmp_path / "run")
    valid = [row for row in rows if row["kind"] == "valid"]
    assert [row["step"] for row in valid] == sorted(due_steps(every))
    assert [row["epoch"] for row in valid] == [row["step"] / PER_EPOCH for row in valid]
    expected = [row for row in long if row["kind"] != "valid" or row["step"] in due_steps(every)]
    assert rows[:-1] == expected[:-1]  # all but the test, of perhaps another adapter
    best = min(valid, key=lambda row: (row["loss"], row["step"]))
    assert (record.best_step, record.valid_loss) == (best["step"], best["loss"])
    assert not record.stopped_early


def test_the_best_adapter_may_be_of_the_midst_of_an_epoch(base: TrainConfig, tmp_path: Path) -> None:
    """It is the one that a run ends with which is stopped there."""
    record = train(changed(base, tmp_path / "run", validate_every=1))
    assert record.best_step is not None
    assert 0 < record.best_step < STEPS
    assert record.best_step % PER_EPOCH
    other = changed(base, tmp_path / "other", validate_every=1, checkpoint_every=100)
    watcher = AtStep(record.best_step, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(other, watcher)
    # Its validation is owed; the next step is never taken.
    with pytest.raises(KeyboardInterrupt):
        train(other, AtStep(1, lambda: signal.raise_signal(signal.SIGINT)))
    assert RunFolder(other.run).adapter.read_bytes() == RunFolder(tmp_path / "run").adapter.read_bytes()


# Stopping


@pytest.mark.parametrize("every", [None, 1, 2, 3])
@pytest.mark.parametrize("patience", [1, 2, 3, 100])
def test_a_run_ends_as_soon_as_patience_does(
    base: TrainConfig, long: list[dict[str, Any]], tmp_path: Path, patience: int, every: int | None
) -> None:
    """Up to there it is the run that had all the patience in the world."""
    recorder = Recorder()
    config = changed(base, tmp_path / "run", validate_every=every, patience=patience)
    record = train(config, recorder)
    rows = metrics(config.run)
    end = stops_at(long, patience, due_steps(every))
    assert (record.status, record.stopped_early) == ("finished", end is not None)
    assert record.steps == (STEPS if end is None else end)
    assert record.epochs == record.steps // PER_EPOCH
    told = [line for line in recorder.said if line.startswith("Stopped early")]
    flags = [row["step"] for row in rows if row.pop("stopped_early", False)]
    expected = [
        row for row in long if row["step"] <= record.steps if row["kind"] != "valid" or row["step"] in due_steps(every)
    ]
    expected = [row for row in expected if row["kind"] != "test"]
    summary = "\n".join(summarise(config, record).lines)
    if end is None:
        assert (flags, told) == ([], [])
        assert "stopped early" not in summary
        assert rows[:-1] == expected
    else:
        assert flags == [end]
        (line,) = told
        assert f"after {end} of {STEPS} steps: {patience} validation" in line
        assert f"The adapter of step {record.best_step} is kept." in line
        assert f"stopped early    after {end} steps" in summary
        # An epoch that was cut has its training loss, too.
        cut = [row for row in rows if row["kind"] == "train" and row["epoch"] % 1]
        assert len(cut) == bool(end % PER_EPOCH)
        assert [row for row in rows[:-1] if row not in cut] == expected
    assert rows[-1]["kind"] == "test"
    assert record.test_loss == rows[-1]["loss"]
    assert record.train_loss == [row["loss"] for row in rows if row["kind"] == "train"][-1]
    valid = [row for row in rows if row["kind"] == "valid"]
    assert record.valid_loss == min(row["loss"] for row in valid)
    again = Recorder()
    assert train(config, again) == record
    assert any("finished already" in line for line in again.said)


def test_these_runs_stop_within_an_epoch_at_its_end_and_not_at_all(long: list[dict[str, Any]]) -> None:
    """Or the test above would show less than it says."""
    ends = {(p, e): stops_at(long, p, due_steps(e)) for p in (1, 2, 3, 100) for e in (None, 1, 2, 3)}
    stops = {end for end in ends.values() if end is not None}
    assert any(end % PER_EPOCH for end in stops)
    assert None in ends.values()
    assert len(stops) >= 3


# Interrupted


@pytest.fixture(scope="module", params=[(1, 2, 2), (2, 1, 3)], ids=["every-step", "every-second"])
def stopping(
    request: pytest.FixtureRequest, base: TrainConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Any]:
    """A run that stops early, and what it leaves."""
    every, patience, pace = request.param
    run = tmp_path_factory.mktemp("stopping") / "run"
    config = changed(base, run, validate_every=every, patience=patience, checkpoint_every=pace)
    assert train(config).stopped_early
    return config, outcome(run)


def test_an_interruption_after_any_step_is_made_good(stopping: tuple[TrainConfig, Any], tmp_path: Path) -> None:
    config, whole = stopping
    for step in range(1, whole[2]["steps"] + 1):
        here = changed(config, tmp_path / f"run{step}")
        with pytest.raises(KeyboardInterrupt):
            train(here, AtStep(step, lambda: signal.raise_signal(signal.SIGINT)))
        resumed = AtStep(-1, None)
        train(here, resumed)
        assert resumed.steps == whole[2]["steps"] - step
        assert outcome(here.run) == whole


def test_power_cuts_are_made_good(stopping: tuple[TrainConfig, Any], tmp_path: Path, writes: Writes) -> None:
    """Four runs, each cut again and again after a few writes, those around its early end among them."""
    config, whole = stopping
    generator = random.Random(7)
    cuts = 0
    for number in range(4):
        here = changed(config, tmp_path / f"run{number}", checkpoint_every=1 + number % 2)
        cuts += cut_until_done(partial(train, here), writes, lambda: generator.randrange(8, 40))
        assert outcome(here.run) == whole
    assert cuts > 8


# What cannot be


@pytest.mark.parametrize("flag", ["patience", "validate_every"])
@pytest.mark.parametrize("valid", ["none", "empty", "too long", "nothing to learn"])
def test_without_rows_to_validate_on_it_is_refused_before_anything_is_made(
    tiny_model: Path, tmp_path: Path, flag: str, valid: str
) -> None:
    data = make_data(tmp_path / "data", valid=0)
    content = {
        "empty": "",
        "too long": json.dumps(chat(3) | {"text": "x"}).replace("print", "print" * 300) + "\n",
        "nothing to learn": json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n",
    }
    if valid in content:
        (data / "valid.jsonl").write_text(content[valid], encoding="utf-8")
    config = settings(data, tiny_model, tmp_path / "run", **{flag: 2})
    with pytest.raises(ConfigError, match=f"{flag} = 2: there is nothing to validate on") as caught:
        train(config)
    assert f"--{flag.replace('_', '-')}" in str(caught.value)
    assert not RunFolder(config.run).record.exists()
    assert train(changed(config, config.run, **{flag: None})).status == "finished"
